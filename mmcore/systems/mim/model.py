"""A tower that sees an image with patches masked, and a linear head that predicts something of those."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.data.transforms.masks import block_mask, coarse_mask
from mmcore.nn import Linear, Transformer
from mmcore.ops import require
from mmcore.parts.vit import VisionConfig, ViT


@dataclass(frozen=True)
class MaskConfig:
    """How patches are masked: cells of `cell` by `cell` patches (SimMIM), or rectangles of at least `min_block` patches
    (BEiT), until a share of `ratio` is."""

    kind: Literal["cells", "blocks"] = "blocks"
    ratio: float = 0.4
    cell: int = 1
    min_block: int = 16

    def grid(self, side: int, rng: np.random.Generator) -> np.ndarray:
        """bool [side, side], True where a patch is masked; errors as of `coarse_mask` and `block_mask`."""
        if self.kind == "cells":
            return coarse_mask((side, side), self.cell, self.ratio, rng)
        count = int(side**2 * self.ratio)
        return block_mask((side, side), count, min(self.min_block, max(1, count)), 0.3, rng)

    def draw(self, side: int, rng: np.random.Generator) -> Tensor:
        """The same, bool [side * side]."""
        return torch.from_numpy(self.grid(side, rng).reshape(-1))


@dataclass(frozen=True)
class MimConfig:
    """Shape of the tower, how it is masked, and what the head predicts of a patch.

    Args:
        outputs: of the head: values, tokens or the width of features.
        init_std: of the initial weights, which are cut off at one deviation.
        class_layers: layers of BEiT v2's second branch, which reads the last class token and the patches as they are
            behind layer `class_from`; 0 = there is none.
        average_top: data2vec's last layers, of which a teacher's states are averaged; 0 = there is no such teacher.
    """

    vision: VisionConfig
    outputs: int
    mask: MaskConfig = field(default_factory=MaskConfig)
    init_std: float = 0.02
    class_layers: int = 0
    class_from: int = 9
    average_top: int = 0

    def __post_init__(self) -> None:
        op, num_layers = "MimConfig", self.vision.num_layers
        require(op, self.outputs >= 1, "outputs must be at least 1, got {}", self.outputs)
        has_tokens = self.vision.has_mask_token and self.vision.has_class_token and self.vision.num_registers == 0
        require(op, has_tokens, "vision must have a mask token, a class token and no registers, got {}", self.vision)
        fits = self.class_layers == 0 or 1 <= self.class_from <= num_layers
        require(op, fits, "class_from must be a layer of {}, got {}", num_layers, self.class_from)
        fits = 0 <= self.average_top <= num_layers
        require(op, fits, "average_top must be at most {} layers, got {}", num_layers, self.average_top)

    @property
    def side(self) -> int:
        """Patches of a side."""
        return self.vision.image_size // self.vision.patch_size


def draw_weights(x: Tensor, std: float) -> None:
    """Normal numbers of deviation `std`, cut off at one deviation. torch's own draws again until none is outside, which
    a plan cannot count."""
    within = math.erf(2**-0.5)
    x.uniform_(-within, within).erfinv_().mul_(2**0.5 * std)


class Mim(nn.Module):
    """The tower, `visual`, the `head`, and BEiT v2's second branch, `class_branch`, where there is one."""

    def __init__(self, config: MimConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.visual = ViT(vision)
        self.head = Linear(vision.width, config.outputs)
        self.class_branch = None
        if config.class_layers:
            options = {"is_causal": False, "activation": vision.activation, "norm_eps": vision.norm_eps}
            options |= {"layer_scale": vision.layer_scale, "qkv_bias": vision.qkv_bias, "drop_path_uniform": True}
            options["relative_side"] = config.side if vision.relative_positions == "layers" else None
            sizes = vision.width, config.class_layers, vision.num_heads, vision.mlp_dim
            self.class_branch = Transformer(*sizes, **options, drop_path=vision.drop_path)
        self.targets: Callable[[Tensor], Tensor] | None = None  # images to [B, P, ...], of what does not learn
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As BEiT's: cut off normal weights, those that a residual ends with divided by sqrt(2 layer), biases 0."""
        config, visual = self.config, self.visual
        drawn: list[Any] = [visual.class_embedding, visual.mask_token]
        if config.vision.positions == "learned":
            drawn.append(visual.position_embedding)
        drawn += [m.weight for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for x in drawn:
            draw_weights(x, config.init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        blocks: list[tuple[int, Any]] = list(enumerate(visual.transformer.blocks, 1))
        if self.class_branch is not None:
            blocks += enumerate(self.class_branch.blocks, config.class_from + 1)
        for depth, block in blocks:
            for layer in (block.attn.out, block.mlp.fc2):  # pyright: ignore[reportAttributeAccessIssue]
                layer.weight.div_((2 * depth) ** 0.5)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]

    def forward(
        self,
        images: Tensor,
        masked: Tensor | None = None,
        places: Tensor | None = None,
        seen: Tensor | None = None,
        *,
        only_states: bool = False,
        teaches: bool = False,
    ) -> Any:
        """Predicts masked patches.

        Args:
            images: [B, 3, S, S], uint8, or floating point where they are normalised already.
            masked: bool [B, P].
            places: int64 [N], the masked patches among all B * P; None = all are predicted, by the tower's end alone.
            seen: what `targets` is given; None = `images`.
            only_states: what the tower makes of whole images, [B, 1 + P, D].
            teaches: data2vec's targets of whole images, [B, P, D]: the mean of the last layers' normalised states.

        Returns:
            A list of predictions [N, C], one, and with BEiT v2's branch another, and the targets, [N, ...], None
            without `targets`; without places predictions alone, [B, P, C].
        """
        if only_states:
            return self.visual(images)
        if teaches:
            return self._taught(images)
        states: list[Tensor] = []
        found = self.visual(images, masked=masked, states=states)
        if places is None:
            return self.head(found[:, 1:])
        ends = [found]
        if self.class_branch is not None:
            x = torch.cat([states[-1][:, :1], states[self.config.class_from - 1][:, 1:]], 1)
            bias = None if self.visual.relative is None else self.visual.relative()
            ends.append(self.visual.norm_post(self.class_branch(x, bias=bias)))
        predicted = [self.head(x[:, 1:].flatten(0, 1)[places]) for x in ends]
        if self.targets is None:
            return predicted, None
        with torch.no_grad():
            return predicted, self.targets(images if seen is None else seen).flatten(0, 1)[places]

    def _taught(self, images: Tensor) -> Tensor:
        states: list[Tensor] = []
        self.visual(images, states=states)
        last = [x[:, 1:].to(torch.promote_types(x.dtype, torch.float32)) for x in states[-self.config.average_top :]]
        return torch.stack([F.layer_norm(x, x.shape[-1:]) for x in last]).mean(0)
