"""DINO's image tower and head, with what iBOT and DINOv2 add: patches through the head, or through one of their own
(arXiv 2104.14294, 2111.07832, 2304.07193)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmcore.ops import require
from mmcore.parts.heads import PrototypeHead
from mmcore.parts.vit import VisionConfig, ViT


@dataclass(frozen=True)
class DINOConfig:
    """Shape of the tower and of the head: `num_prototypes` outputs, by a last layer whose rows have the norm 1 or one
    that is learned. Of patches `patch_prototypes`, of a head of their own; None = by the same head. Weights begin
    with the deviation `init_std`; None = each layer with its own, which narrow towers need."""

    vision: VisionConfig
    hidden: int = 2048
    bottleneck: int = 256
    num_prototypes: int = 65_536
    learns_norm: bool = False
    patch_prototypes: int | None = None
    init_std: float | None = 0.02

    def __post_init__(self) -> None:
        for name in ("hidden", "bottleneck", "num_prototypes"):
            value = getattr(self, name)
            require("DINOConfig", value >= 1, "{} must be at least 1, got {}", name, value)
        require("DINOConfig", self.vision.has_class_token, "vision must have a class token, got {}", "none")

    @property
    def num_of_patches(self) -> int:
        """Outputs of a patch."""
        return self.patch_prototypes or self.num_prototypes


class Outputs(NamedTuple):
    """Of views, view by view: states of large ones, [V, B, D] of class tokens and [V B, P, D] of patches, and logits of
    class tokens, [V, B, K] of large ones and [L, B, K] of small ones, and of patches that were asked for, [N, K']."""

    tokens: Tensor
    states: Tensor
    large: Tensor
    small: Tensor
    patches: Tensor | None


class DINOModel(nn.Module):
    """The tower, `visual`, which reads images of any size, the head, `head`, and `patch_head` where there is one."""

    def __init__(self, config: DINOConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision)
        self.visual.has_any_size = True
        sizes, options = (config.hidden, config.bottleneck), {"learns_norm": config.learns_norm}
        width, own = config.vision.width, config.patch_prototypes
        self.head = PrototypeHead(width, *sizes, config.num_prototypes, **options)
        self.patch_head = None if own is None else PrototypeHead(width, *sizes, own, **options)
        if config.init_std is not None:
            self.init_weights(config.init_std)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """As published: matrices and positions of that deviation, biases 0; the class token as positions, or as
        registers where layers are scaled, as in DINOv2."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.visual.position_embedding, std=std)  # pyright: ignore[reportArgumentType]
        assert self.visual.class_embedding is not None
        if self.config.vision.layer_scale is None:
            nn.init.trunc_normal_(self.visual.class_embedding, std=std)
        else:
            nn.init.normal_(self.visual.class_embedding, std=1e-6)

    def forward(
        self,
        images: Tensor,
        small: Tensor | None = None,
        masked: Tensor | None = None,
        places: Tensor | None = None,
        *,
        only_states: bool = False,
    ) -> Any:
        """Logits and states of views.

        Args:
            images: large views [V, B, 3, S, S], of the tower's size; with `only_states` images [B, 3, S, S].
            small: views [L, B, 3, s, s], of a multiple of the patches' size; L may be 0.
            masked: bool [V, B, P], the patches of large views that the mask token stands for; None = none.
            places: int64 [N], patches that go through the head, numbered over [V, B, P]; None = none.
            only_states: return the tower's states [B, prefix + P, D] instead.

        Returns:
            `Outputs`.
        """
        if only_states:
            return self.visual(images)
        num, size = images.shape[:2]
        states = self.visual(images.flatten(0, 1), masked=None if masked is None else masked.flatten(0, 1))
        tokens, patches = states[:, 0], states[:, self.config.vision.num_prefix :]
        rows = [tokens]
        if small is not None and len(small):
            rows.append(self.visual(small.flatten(0, 1))[:, 0])
        asked = None if places is None else patches.flatten(0, 1)[places]
        if asked is not None and self.patch_head is None:
            rows.append(asked)
        logits = self.head(torch.cat(rows)).split([len(x) for x in rows])
        large = logits[0].unflatten(0, (num, size))
        of_small = logits[1].unflatten(0, (-1, size)) if small is not None and len(small) else large[:0]
        of_patches = None if asked is None else logits[-1] if self.patch_head is None else self.patch_head(asked)
        return Outputs(tokens.unflatten(0, (num, size)), patches, large, of_small, of_patches)
