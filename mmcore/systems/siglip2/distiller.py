"""What SigLIP 2 learns of views in the last part of its training: small ones agree with a teacher's large one (SILC,
arXiv 2310.13355), and masked patches are predicted (TIPS, arXiv 2410.16512)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmcore.data.transforms.naflex import NaflexPreprocess, Patches, cut
from mmcore.data.transforms.views import DINO
from mmcore.ops import distillation_loss
from mmcore.parts.heads import PrototypeHead

NUM_SMALL = 8
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
_HIDDEN, _BOTTLENECK = 2048, 256
_SMALL = 96 / 224  # side of a small view over a large one's


def small_side(side: int) -> int:
    """Patches a side of a small view beside a large one's."""
    return max(1, round(_SMALL * side))


def num_patches(side: int) -> int:
    """Of all views of an image."""
    return side**2 + NUM_SMALL * small_side(side) ** 2


class Views(NamedTuple):
    """Augmented views: a large one of each of B images, `NUM_SMALL` small ones view by view, and which patches of
    each large one the student does not see, int64 [B, M]."""

    large: Patches
    small: Patches
    masked: Tensor

    @property
    def num_patches(self) -> int:
        """Of all views of an image."""
        return (len(self.large.rows) + len(self.small.rows)) // len(self.masked)

    @property
    def places(self) -> Tensor:
        """Of the masked patches among those of all large ones, int64 [B M]."""
        size = len(self.masked)
        first = torch.arange(size, device=self.masked.device) * (len(self.large.rows) // size)
        return (first[:, None] + self.masked).flatten()

    @classmethod
    def drawn(
        cls, record: Any, preprocess: NaflexPreprocess, side: int, flip: float, rng: np.random.Generator
    ) -> "Views":
        """DINO's views of an image, the large one of `side` patches a side; half of its patches are masked."""
        patch, sides = preprocess.patch_size, [side] + [small_side(side)] * NUM_SMALL
        views = [
            replace(kind, size=cells * patch, interpolation=preprocess.interpolation, flip=flip)
            for kind, cells in zip([DINO[0]] + [DINO[-1]] * NUM_SMALL, sides, strict=True)
        ]
        image = record.load(max(view.least for view in views))
        large, *small = (
            cut(view(image, rng), (cells, cells), patch, preprocess.resample)
            for view, cells in zip(views, sides, strict=True)
        )
        masked = torch.from_numpy(np.sort(rng.permutation(side**2)[: side**2 // 2]))
        return cls(large, Patches.joined(small), masked[None])

    @classmethod
    def joined(cls, samples: Sequence["Views"]) -> "Views":
        """Of several samples."""
        small = [x.small.part(slice(i, i + 1)) for i in range(NUM_SMALL) for x in samples]
        large = Patches.joined([x.large for x in samples])
        return cls(large, Patches.joined(small), torch.cat([x.masked for x in samples]))

    def part(self, images: slice, size: int) -> "Views":
        """Those of some of `size` images, which follow each other."""
        small = [self.small.part(slice(i + images.start, i + images.stop)) for i in range(0, NUM_SMALL * size, size)]
        return Views(self.large.part(images), Patches.joined(small), self.masked[images])


class Targets(NamedTuple):
    """What a teacher makes of large views, [B, K], and of their patches that the student does not see, [M, K]; and what
    is taken off both."""

    image: Tensor
    patches: Tensor
    centre: Tensor | None = None
    patch_centre: Tensor | None = None


class Distiller(nn.Module):
    """The mask token, and heads of prototypes on images and on patches."""

    def __init__(self, width: int, num_prototypes: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(width))
        sizes = width, min(_HIDDEN, 4 * width), min(_BOTTLENECK, width), num_prototypes
        self.head, self.patch_head = (PrototypeHead(*sizes, learns_norm=False) for _ in range(2))

    def targets(self, tower: Any, views: Views) -> Targets:
        """As a teacher."""
        pooled, states, _ = tower(views.large)
        return Targets(self.head(pooled), self.patch_head(states[0].index_select(0, views.places)))

    def losses(self, tower: Any, views: Views, targets: Targets) -> tuple[Tensor, Tensor]:
        """Of small views, and of masked patches: the mean over those of an image, [B, 1] each."""
        size = len(targets.image)
        temperatures = STUDENT_TEMPERATURE, TEACHER_TEMPERATURE
        small = self.head(tower(views.small)[0]).unflatten(0, (-1, size))
        of_views = [
            distillation_loss(x, targets.image, *temperatures, targets.centre, reduction="none") for x in small.unbind()
        ]
        states = tower(views.large, views.places, self.mask_token)[1][0]
        told = self.patch_head(states.index_select(0, views.places))
        of_patches = distillation_loss(told, targets.patches, *temperatures, targets.patch_centre, reduction="none")
        return torch.stack(of_views, 1).mean(1, keepdim=True), of_patches.view(size, -1).mean(1, keepdim=True)
