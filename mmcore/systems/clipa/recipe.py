"""CLIPA's recipe."""

from dataclasses import dataclass, field
from functools import partial

from mmcore.recipe import Claim, Proof
from mmcore.systems.flip.recipe import FewerTokens
from mmcore.train.optim import OptimConfig

# 8e-6 for 256 pairs, in proportion to the batch of 32,768
_published = partial(OptimConfig, lr=1.024e-3, beta2=0.95, eps=1e-8, weight_decay=0.2)


@dataclass(frozen=True)
class Clipa(FewerTokens):
    """Train CLIPA (arXiv 2305.07017): CLIP on smaller pictures and shorter captions, then on whole ones."""

    optim: OptimConfig = field(default_factory=_published)
    image_scale: float = 0.5
    """What a picture's side is multiplied by, rounded to patches; positions are interpolated."""
    text_tokens: int | None = 8
    """Tokens that a caption is cut to, its end token kept; None = as the model has them."""
    full_share: float = 0.05
    """Last share of the steps in which pictures and captions are whole."""


_FLAGS = (
    "--data digits --model tiny --image-scale 0.75 --text-tokens 10 --batch-size 128 --epochs 30 --lr 1e-3 --ema 0.98 "
    "--full-share 0.25"
)
PROOF = Proof([("clipa", _FLAGS)], [Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.8)])
