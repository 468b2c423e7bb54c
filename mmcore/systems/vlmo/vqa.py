"""VLMo fine-tuned to answer questions by a classifier."""

from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from mmcore.data import PairData
from mmcore.fusion_recipe import AnswerBatch, AnswersQuestions, FusionAssets
from mmcore.losses import trimmed
from mmcore.ops import require
from mmcore.parts.answers import answer_loss
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.systems.vlmo.recipe import PRETRAINED, PUBLISHED, OnVlmo
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig, Rule


@dataclass(frozen=True)
class VlmoVqa(AnswersQuestions, OnVlmo):
    """Train VLMo to answer questions about images (arXiv 2111.02358), from a run of vlmo or a published file."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=10, batch_size=16))
    optim: OptimConfig = field(default_factory=partial(PUBLISHED, lr=3e-5, warmup=100_000))
    head_lr_scale: float = 20.0
    """What the learning rate of the classifier is multiplied by."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("answer_head.", lr_scale=self.head_lr_scale), *super().rules)

    def assets(self, data: PairData) -> FusionAssets:
        require(self.name, self.head_lr_scale > 0, "--head-lr-scale must be above 0, got {}", self.head_lr_scale)
        return super().assets(data)

    def loss(self, model: Runner, batch: AnswerBatch, step: Step) -> dict[str, Tensor]:
        logits = model("answer", batch.images, trimmed(batch.tokens, batch.num_text), batch.num_text)
        return {"loss": answer_loss(logits, batch.targets)}


_TUNE = "--data digits --from {2} --max-text 16 --epochs 8 --batch-size 64 --lr 1e-3 --head-lr-scale 2 --ema 0.99"
PROOF = Proof([*PRETRAINED, ("vlmo-vqa", _TUNE)], [Claim("VQA accuracy (held-out)", "VQA accuracy", 0.80)])
