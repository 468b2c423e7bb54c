"""ViLT fine-tuned to answer questions."""

from dataclasses import dataclass
from typing import Any

from mmcore.fusion_recipe import AnswerBatch, AnswersQuestions, FusionSample
from mmcore.recipe import Claim, Proof
from mmcore.systems.vilt.recipe import PRETRAIN, TOWER, OnVilt
from mmcore.train.optim import Rule

HEAD_RATE = 10.0


@dataclass(frozen=True)
class ViltVqa(OnVilt, AnswersQuestions):
    """Fine-tune ViLT (arXiv 2102.03334) to answer questions, as a classifier of frequent answers."""

    ends_in = "answers"

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("head.", lr_scale=HEAD_RATE),)

    def collate(self, assets: Any, samples: list[FusionSample]) -> AnswerBatch:
        batch = super().collate(assets, samples)
        return batch._replace(num_text=batch.num_text.tolist())


_TUNE = "--data digits --from {1} --batch-size 64 --epochs 6 --lr 1e-3 --schedule cosine --ema 0.98"
PROOF = Proof([TOWER, PRETRAIN, ("vilt-vqa", _TUNE)], [Claim("VQA accuracy (held-out)", "VQA accuracy", 0.8)])
