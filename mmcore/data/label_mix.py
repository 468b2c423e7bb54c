"""Images with a label and images with a caption as one source of pairs (UniCL, arXiv:2204.03610)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmcore.data.sources.base import PairSource
from mmcore.data.transforms.images import Preprocess
from mmcore.ops import require


def class_of(source: PairSource, i: int) -> int:
    """The class of a record of a source of classes."""
    return source.label(i, source.all_captions(i)[0])


@dataclass(frozen=True)
class LabelMix(PairSource):
    """Pairs, then images with labels: a label's caption is one of `templates` with the name of its class, and its label
    the class; the label of a pair is its own, above all classes, so that it is a positive of nothing else.

    Args:
        pairs, of_pairs: a source, and which of its records are image-caption pairs.
        labelled, of_labels: a source of classes, and which of its records are images with a label.
        class_names: of its classes.
        templates: captions with '{}' in place of a class's name.
    """

    pairs: PairSource
    of_pairs: Sequence[int]
    labelled: PairSource
    of_labels: Sequence[int]
    class_names: Sequence[str]
    templates: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("class_names", "templates", "of_labels"):
            require("LabelMix", len(getattr(self, name)) > 0, "{} must hold at least one, got none", name)

    def _place(self, i: int) -> tuple[PairSource, int]:
        count = len(self.of_pairs)
        return (self.pairs, self.of_pairs[i]) if i < count else (self.labelled, self.of_labels[i - count])

    def __len__(self) -> int:
        return len(self.of_pairs) + len(self.of_labels)

    def sample_id(self, i: int) -> str:
        source, at = self._place(i)
        return source.sample_id(at)

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        source, at = self._place(i)
        return source.raw_image(at, least)

    def image_id(self, i: int) -> int:
        source, at = self._place(i)
        return source.image_id(at)

    def augment(self, i: int, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        source, at = self._place(i)
        return source.augment(at, preprocess, rng)

    def all_captions(self, i: int) -> list[str]:
        source, at = self._place(i)
        if i < len(self.of_pairs):
            return source.all_captions(at)
        return [template.replace("{}", self.class_names[class_of(source, at)]) for template in self.templates]

    def label(self, i: int, caption: str) -> int:
        source, at = self._place(i)
        return len(self.class_names) + i if i < len(self.of_pairs) else class_of(source, at)
