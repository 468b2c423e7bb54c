"""LXMERT fine-tuned to answer questions."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mmcore.fusion_recipe import AnswersQuestions
from mmcore.recipe import Claim, Proof
from mmcore.systems.lxmert.recipe import FLAGS, PUBLISHED, READING, LxmertAssets, OnLxmert
from mmcore.train.optim import OptimConfig


@dataclass(frozen=True)
class LxmertVqa(OnLxmert, AnswersQuestions):
    """Fine-tune LXMERT (arXiv 1908.07490) to answer questions, as a classifier of frequent answers."""

    optim: OptimConfig = field(default_factory=partial(PUBLISHED, lr=5e-5, warmup_share=0.1))

    def assets(self, data: Any) -> LxmertAssets:
        found = super().assets(data)
        ends: Any = {"head": "answers", "num_objects": 0, "num_attributes": 0}
        return replace(found, shape=replace(found.shape, **ends))


_TUNE = ("lxmert-vqa", f"{FLAGS} --from {{0}} --epochs 6 --schedule const-cooldown --ema 0.98")
_CAPTIONS = ("lxmert", f"{FLAGS} --from {{1}} --epochs 60 --schedule cosine --ema 0.99")
PROOF = Proof([READING, _TUNE], [Claim("VQA accuracy (held-out)", "VQA accuracy", 0.75)])
MATCHING = Proof(
    [READING, _TUNE, _CAPTIONS],
    [Claim("cloze accuracy (held-out)", "cloze accuracy", 0.75), Claim("ITM accuracy (held-out)", "ITM accuracy", 0.8)],
)
