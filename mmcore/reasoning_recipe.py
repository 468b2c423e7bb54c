"""What recipes have in common whose models judge sentences about two images, as NLVR2 asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmcore.data import LoaderSpec, TrainLoader
from mmcore.data.broken import BrokenTally
from mmcore.data.loader import MapLoader
from mmcore.data.sources.statements import StatementData, StatementRecord, open_statements
from mmcore.fusion_recipe import FusionAssets, FusionRecipe
from mmcore.losses import global_ratio
from mmcore.recipe import Runner, Step
from mmcore.tasks.reasoning import Judges


class JudgedSample(NamedTuple):
    """Two images, a sentence, and whether it is true."""

    images: tuple[Any, Any]
    text: str
    is_true: bool


class JudgedBatch(NamedTuple):
    """Sentences about two images each."""

    images: list[Any]  # of all samples the first, of all the second
    tokens: Tensor  # int64 [B, T]
    num_text: list[int]
    is_true: Tensor  # int64 [B], 0 or 1


@dataclass(frozen=True)
class JudgesPairs(FusionRecipe):
    """Mixin: the model tells whether a sentence about two images is true, `model("judge", images, tokens, num_text)` to
    logits of no and yes [B, 2], `images` being the first of all samples and the second of all."""

    tasks = ("reasoning",)

    def open_data(self) -> Any:
        return open_statements(self.data, seed=self.run.seed)

    def loader(self, data: Any, assets: Any, spec: LoaderSpec) -> TrainLoader:
        train = data.train
        tally = BrokenTally(self.data.max_broken, f"{data.name!r}", train.broken)
        return MapLoader(train, spec, self.reader(assets), tally)

    def texts(self, data: StatementData) -> Sequence[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [x.text for x in data.train.statements]

    def sample(self, assets: Any, record: StatementRecord, rng: np.random.Generator) -> Any:
        images = [self.view(assets, record.load(which), rng) for which in range(2)]
        return JudgedSample((images[0], images[1]), record.text, record.is_true)

    def collate(self, assets: FusionAssets, samples: list[JudgedSample]) -> JudgedBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        images = [self.joined([x.images[which] for x in samples]) for which in range(2)]
        tokens, num_text = assets.wordpiece.padded([x.text for x in samples], self.max_text)
        return JudgedBatch(images, tokens, num_text.tolist(), torch.tensor([int(x.is_true) for x in samples]))

    def loss(self, model: Runner, batch: JudgedBatch, step: Step) -> dict[str, Tensor]:
        logits = model("judge", batch.images, batch.tokens, batch.num_text)
        total = F.cross_entropy(logits.float(), batch.is_true, reduction="sum")
        return {"loss": global_ratio(total, torch.tensor(len(logits), device=logits.device))}

    def judges(self, assets: FusionAssets, model: Runner, device: torch.device) -> Judges:
        def scores(images: Sequence[Sequence[Image.Image]], texts: Sequence[str]) -> Tensor:
            pixels = [assets.preprocess(x).to(device) for x in images]
            logits = model("judge", pixels, *self.padded(assets, texts, device))
            return logits[:, 1] - logits[:, 0]

        return scores
