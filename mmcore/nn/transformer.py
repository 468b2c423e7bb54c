"""Pre-LN transformer blocks, as CLIP's two towers stack them."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcore.nn.attention import Attention, KeyValueCache, QKVBias, check_dropout
from mmcore.nn.linear import MLP, SwiGLU
from mmcore.nn.packing import Packing
from mmcore.nn.relative import RelativePositions
from mmcore.ops import masks

Pool = Callable[[Tensor], Tensor]


def residual(x: Tensor, scale: Tensor | None, drop_path: float) -> Tensor:
    """What is added of `x` [B, ...]: scaled, and left out of a share of the samples, the others' growing by as much."""
    x = x if scale is None else x * scale
    if drop_path == 0:
        return x
    kept = torch.rand(len(x), device=x.device) >= drop_path
    return x * (kept.to(x.dtype) / (1 - drop_path)).view(-1, *[1] * (x.ndim - 1))


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)); what is added is scaled and dropped where there are such options.

    Args:
        layer_scale: what the learned scales of each channel start from (LayerScale, arXiv:2103.17239); None = none.
        drop_path: share of the samples that training leaves a residual out of, the others' grows by as much
            (stochastic depth, arXiv:1603.09382), from 0, below 1.
        has_swiglu: the feed-forward is a `SwiGLU`, which needs no activation.
        qkv_bias: see `Attention`.
        relative_side: the side of the grid of patches behind a class token that the layer has `RelativePositions` of
            its own for; None = none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        is_causal: bool,
        activation: str,
        norm_eps: float,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        has_swiglu: bool = False,
        qkv_bias: QKVBias = "all",
        relative_side: int | None = None,
    ) -> None:
        super().__init__()
        check_dropout("Block", drop_path)
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads, is_causal=is_causal, qkv_bias=qkv_bias)
        self.relative = None if relative_side is None else RelativePositions(relative_side, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = SwiGLU(width, mlp_dim) if has_swiglu else MLP(width, mlp_dim, activation=activation)
        scales = [None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2)]
        self.scale1, self.scale2 = scales

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        pool: Pool | None = None,
        bias: Tensor | None = None,
        mask: masks.Mask | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D], or to what `pool` takes of it: the feed-forward is computed for that alone; `bias`,
        [1, H, T, T], is added to the logits, and stands in place of `mask`. For `mask` and `cache` see `Attention`."""
        if self.relative is not None:
            bias = self.relative(math.isqrt(x.shape[1] - 1))
        mask = mask if bias is None else masks.Dense(bias)
        dropped = self.drop_path if self.training else 0.0
        x = x + residual(self.attn(self.norm1(x), mask, cache, packing), self.scale1, dropped)
        x = x if pool is None else pool(x)
        return x + residual(self.mlp(self.norm2(x)), self.scale2, dropped)

    @torch.no_grad()
    def init_weights(self, num_layers: int) -> None:
        """CLIP's scheme: residual outputs shrink by sqrt(2 * num_layers); biases 0 (arXiv 2103.00020)."""
        width = self.attn.qkv.in_features
        attn, shrunk = self.attn, (2 * num_layers * width) ** -0.5
        first, last = self.mlp.children()
        stds = {attn.qkv: width**-0.5, attn.out: shrunk, first: (2 * width) ** -0.5, last: shrunk}
        for layer, std in stds.items():
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Transformer(nn.Module):
    """A stack of pre-LN blocks, bidirectional or causal, with optional activation checkpointing.

    `layer_scale` and what follows are of `Block`; `drop_path` rises from 0 in the first block to what is given in the
    last; with `drop_path_uniform` it is the same in all.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        *,
        is_causal: bool,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        drop_path_uniform: bool = False,
        has_swiglu: bool = False,
        qkv_bias: QKVBias = "all",
        relative_side: int | None = None,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = False
        shares = [1.0 if drop_path_uniform else i / max(1, num_layers - 1) for i in range(num_layers)]
        options = {"is_causal": is_causal, "activation": activation, "norm_eps": norm_eps, "layer_scale": layer_scale}
        options["has_swiglu"] = has_swiglu
        options |= {"qkv_bias": qkv_bias, "relative_side": relative_side}
        blocks = [Block(width, num_heads, mlp_dim, **options, drop_path=drop_path * share) for share in shares]
        for block in blocks:
            block.init_weights(num_layers)
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        pool: Pool | None = None,
        bias: Tensor | None = None,
        states: list[Tensor] | None = None,
        mask: masks.Mask | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D], or to what `pool` takes of the states; for `packing` and `mask` see `Attention`, for
        `bias` `Block`. `states` gets what each block makes, one after the other; `caches` hold what came before, one a
        block."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            inputs = x, packing, pool if i == last else None, bias, mask, None if caches is None else caches[i]
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            if states is not None:
                states.append(x)
        return x
