"""LiT's recipe."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.broken import BrokenRecord
from mmcore.data.collate import PairSample
from mmcore.data.feature_cache import FeatureCache, digest
from mmcore.data.sources.base import PairSource
from mmcore.ops import require
from mmcore.recipe import Claim, Proof
from mmcore.runs import load_weights
from mmcore.settings import once
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.recipe import Clip
from mmcore.tasks.subject import default_device
from mmcore.train.optim import OptimConfig
from mmcore.two_towers import PairAssets

# big_vision takes 1e-4 of a weight off apart from the learning rate, which at 1e-3 is AdamW's 0.1
_published = partial(OptimConfig, lr=1e-3, beta2=0.999, eps=1e-8, weight_decay=0.1, warmup_share=0.03)
_LOG_SCALE = math.log(10)
_PART, _BATCH = 1024, 64


@dataclass(frozen=True)
class Lit(Clip):
    """Train LiT (arXiv 2111.07991): a text tower for a locked image tower, with CLIP's loss."""

    optim: OptimConfig = field(default_factory=_published)
    vision: str | None = field(default=None, metadata=once)
    """The image tower: a run that has one, such as of mae or clip; a folder of transformers (CLIP, SigLIP, ViT or
    another vision model) or open_clip; timm:NAME@FILE.safetensors."""
    image_head: bool = False
    """Project what the image tower gives; --no-image-head: the texts meet it as it is, the paper's best."""
    lock_image: bool = True
    """Keep the image tower of --vision or --init as it is: no gradient, no moments, evaluation mode."""
    feature_cache: Path | None = None
    """Folder for the features of the training images, which are computed once, before the first step, and read from
    there in every epoch and run, without augmentation; of sources in random access."""

    def assets(self, data: PairData) -> PairAssets:
        if self.vision is None and self.init is None:
            raise ValueError("--vision must be given, the image tower that texts are learned for, or --init")
        if self.feature_cache is not None:
            is_locked = self.lock_image and self.lock_image_unlocked_groups <= 1
            require("lit", is_locked, "--feature-cache must come with a locked image tower, got one that learns")
            has_places = isinstance(data.source, PairSource)
            require("lit", has_places, "--feature-cache must be of data in random access, got {!r}", data.name)
        recipe = self if self.init is None else replace(self, image_head=True)
        found = super(Lit, recipe).assets(data)
        return replace(found, shape=replace(found.shape, init_log_logit_scale=_LOG_SCALE))

    def prepare(self, data: PairData, assets: PairAssets, rank: int, world_size: int) -> None:
        if self.feature_cache is None:
            return
        source, key = data.source, self._key(assets)
        assert isinstance(source, PairSource)
        if rank == 0:
            FeatureCache(self.feature_cache, key)
        dist.barrier()
        store = FeatureCache(self.feature_cache, key)
        first = {source.image_id(i): i for i in reversed(range(len(source)))}
        missing = [i for image, i in sorted(first.items()) if image not in store][rank::world_size]
        for images, features in self._features(source, missing, assets) if missing else ():
            store.add(images, features)
        dist.barrier()
        _opened.cache_clear()

    def _key(self, assets: PairAssets) -> dict[str, Any]:
        """What features depend on."""
        names = "data", "image_root", "language", "style", "stamps_dir"
        data = {name: str(getattr(self.data, name)) for name in names}
        shape = {"image tower": asdict(assets.shape.vision), "read": assets.shape.image_pool}
        weights = {n: x for n, x in assets.frozen.items() if n.startswith("visual.")}
        weights.pop("visual.proj.weight", None)
        return {**shape, "weights": digest(weights), "pictures": asdict(assets.preprocess), "data": data}

    @torch.no_grad()
    def _features(
        self, source: PairSource, places: list[int], assets: PairAssets
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Ids of images and their features, a file's at a time; broken images are left out."""
        device, model = default_device(), CLIP(assets.shape)
        load_weights(model, assets.frozen, is_whole=False)
        tower: Any = model.visual.eval().to(device)
        for start in range(0, len(places), _PART):
            ids, found = [], []
            for first in range(start, min(start + _PART, len(places)), _BATCH):
                images = []
                for i in places[first : min(first + _BATCH, start + _PART)]:
                    try:
                        images.append(source.raw_image(i))
                        ids.append(source.image_id(i))
                    except BrokenRecord:
                        continue
                if images:
                    found.append(tower.features(assets.preprocess(images).to(device)).float().cpu())
            if found:
                yield ids, torch.cat(found)

    def sample(self, assets: PairAssets, record: Any, rng: np.random.Generator) -> PairSample:
        if self.feature_cache is None:
            return super().sample(assets, record, rng)
        store, caption = _opened(self.feature_cache), record.caption(rng)
        if record.image_id not in store:
            raise BrokenRecord("its image has no features in --feature-cache")
        return PairSample(store[record.image_id], caption, record.label(caption), record.image_id, record.question)


@cache
def _opened(folder: Path) -> FeatureCache:
    """One a process."""
    return FeatureCache(folder)


_CLIP = "--data digits --model tiny --lr"
_LIT = "--vision {0} --data digits --epochs 15 --batch-size 128 --lr 2e-3 --ema 0.98"
PROOF = Proof(
    [("clip", f"{_CLIP} 1e-3 --epochs 30"), ("lit", _LIT)],
    [
        Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.85),
        Claim("zero-shot accuracy, on a random tower", "zero-shot top-1", 0.85, ceiling=0.5, control="without"),
    ],
    [("clip", f"{_CLIP} 1e-9 --steps 1"), ("lit", _LIT)],
)
