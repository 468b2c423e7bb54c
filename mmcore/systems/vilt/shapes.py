"""ViLT's shapes."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

from mmcore.data.transforms.any_size import AnySizePreprocess
from mmcore.ops import require
from mmcore.parts.vit import VisionConfig

Head = Literal["pretraining", "retrieval", "answers", "reasoning"]
"""What the model ends in: words and matching, a score of how well a text fits, answers, or the truth of a sentence
about several images."""

vilt_vision = partial(
    VisionConfig,
    image_size=384,
    norm_eps=1e-12,
    has_norm_pre=False,
    has_patch_bias=True,
    has_final_norm=True,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)
"""`VisionConfig` with the options of ViLT's transformer; its size is of an image's shorter side."""


@dataclass(frozen=True)
class ViltConfig:
    """The transformer, as that of squares with a position for each patch, and what it reads of texts.

    Args:
        vocab_size: words.
        context_length: tokens of a text, at most.
        num_types: of BERT's segments, the first of which is used.
        num_modalities: a text is the first, an image the second, a second image of a sample the third.
        head: see `Head`.
        num_answers: of "answers" and "reasoning".
        num_images: of "reasoning".
    """

    vision: VisionConfig = field(default_factory=vilt_vision)
    vocab_size: int = 30522
    context_length: int = 40
    num_types: int = 2
    num_modalities: int = 2
    head: Head = "pretraining"
    num_answers: int = 0
    num_images: int = 1

    def __post_init__(self) -> None:
        op = "ViltConfig"
        require(op, self.head in get_args(Head), "head must be one of {}, got {!r}", get_args(Head), self.head)
        for name, least in (("vocab_size", 1), ("context_length", 2), ("num_types", 1), ("num_images", 1)):
            value = getattr(self, name)
            require(op, value >= least, "{} must be at least {}, got {}", name, least, value)
        fits, least = self.num_modalities > self.num_images, 1 + self.num_images
        require(op, fits, "num_modalities must be at least {}, got {}", least, self.num_modalities)
        vision = self.vision
        fits = vision.has_class_token and vision.positions == "learned" and not vision.num_registers
        require(op, fits, "vision must have a class token and learned positions, got {}", vision.summary)

    @property
    def preprocess(self) -> AnySizePreprocess:
        """What it wants of an image."""
        vision = self.vision
        numbers = vision.image_mean, vision.image_std, vision.interpolation
        return AnySizePreprocess(vision.image_size, vision.patch_size, *numbers)


VILT_CONFIGS = {
    "tiny": ViltConfig(
        vilt_vision(image_size=16, patch_size=4, width=64, num_layers=3, num_heads=4, mlp_dim=256), vocab_size=1024
    ),
    "B-32": ViltConfig(),
}
