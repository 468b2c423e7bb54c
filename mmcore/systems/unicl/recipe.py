"""UniCL's recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmcore.data import PairData, open_data
from mmcore.data.label_mix import LabelMix, class_of
from mmcore.data.sources.base import PairSource
from mmcore.losses import global_contrastive_loss
from mmcore.ops import require
from mmcore.recipe import Claim, Proof, Step
from mmcore.systems.clip.recipe import Clip, ClipBatch
from mmcore.train.optim import OptimConfig
from mmcore.two_towers import PairAssets

# AdamW's as the repository has them; the rate for pairs is in no published code
_published = partial(OptimConfig, lr=1e-3, beta2=0.999, eps=1e-8, weight_decay=0.1)


@dataclass(frozen=True)
class Unicl(Clip):
    """Train UniCL (arXiv 2204.03610) on image-caption pairs and images with labels in one batch."""

    optim: OptimConfig = field(default_factory=_published)
    label_data: str | None = None
    """Images with labels beside the pairs of --data: data that has classes, as --data names it."""
    label_classes: int | None = None
    """Without --label-data, so many of the classes of --data, the first, are seen by their labels alone and the others
    by their captions alone; None = half of them."""

    def open_data(self) -> PairData:
        data, is_one = super().open_data(), self.label_data is None
        if not is_one and self.label_classes is not None:
            raise ValueError(f"--label-classes has no effect beside --label-data, got {self.label_classes}")
        of_labels = data if is_one else open_data(replace(self.data, data=str(self.label_data)), seed=self.run.seed)
        pairs, labelled, names = data.source, of_labels.source, of_labels.class_names
        for source, name in ((pairs, data.name), (labelled, of_labels.name)):
            has_places = isinstance(source, PairSource)
            require("unicl", has_places, "--data and --label-data must be in random access, got {!r}", name)
        assert isinstance(pairs, PairSource) and isinstance(labelled, PairSource)
        of_pairs, by_label = range(len(pairs)), range(len(labelled))
        classes = [class_of(labelled, i) for i in by_label] if names else []
        is_classed = names is not None and all(0 <= x < len(names) for x in classes)
        flag = "--data without --label-data" if is_one else "--label-data"
        require("unicl", is_classed, "{} must have classes, got {!r}, which has none", flag, of_labels.name)
        assert names is not None
        if is_one:
            count = len(names) // 2 if self.label_classes is None else self.label_classes
            fits, most = 0 < count < len(names), len(names) - 1
            require("unicl", fits, "--label-classes must be from 1 to {}, got {}", most, count)
            by_label = [i for i in by_label if classes[i] < count]
            of_pairs = sorted(set(of_pairs) - set(by_label))
        mix = LabelMix(pairs, of_pairs, labelled, by_label, names, of_labels.templates or ["a photo of a {}."])
        measured = data if data.class_names else of_labels
        named = {"class_names": measured.class_names, "templates": measured.templates}
        return replace(data, source=mix, num_train=len(mix), **named)

    def assets(self, data: PairData) -> PairAssets:
        assets = super().assets(data)
        return replace(assets, shape=replace(assets.shape, init_log_logit_scale=1.0))

    def collate(self, assets: PairAssets, samples: list[Any]) -> ClipBatch:
        return super().collate(assets, samples)._replace(labels=torch.tensor([sample.label for sample in samples]))

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[ClipBatch], step: Step) -> dict[str, Tensor]:
        image, text, scale = features
        labels = torch.cat([part.labels for part in parts if part.labels is not None]).to(image.device)
        return {"loss": global_contrastive_loss(image, text, scale, labels=(labels, labels))}


PROOF = Proof(
    [("unicl", "--data digits --model tiny --epochs 30 --lr 1e-3 --ema 0.99")],
    [Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.85)],
)
