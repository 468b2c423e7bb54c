"""ViLT fine-tuned to judge sentences about two images."""

from dataclasses import dataclass, replace
from typing import Any

from mmcore.fusion_recipe import FusionAssets
from mmcore.reasoning_recipe import JudgesPairs
from mmcore.recipe import Claim, Proof
from mmcore.systems.vilt.answers import HEAD_RATE
from mmcore.systems.vilt.recipe import PRETRAIN, TOWER, OnVilt
from mmcore.train.optim import Rule


@dataclass(frozen=True)
class ViltNlvr2(JudgesPairs, OnVilt):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Fine-tune ViLT (arXiv 2102.03334) to judge sentences about two images, as NLVR2 has them."""

    ends_in = "reasoning"
    num_images = 2

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("head.", lr_scale=HEAD_RATE),)

    def assets(self, data: Any) -> FusionAssets:
        found = super().assets(data)
        return replace(found, shape=replace(found.shape, num_answers=2))


_TUNE = "--data digits --from {1} --batch-size 64 --epochs 4 --lr 5e-4 --schedule cosine --ema 0.98"
PROOF = Proof(
    [TOWER, PRETRAIN, ("vilt-nlvr2", _TUNE)], [Claim("reasoning accuracy (held-out)", "reasoning accuracy", 0.8)]
)
