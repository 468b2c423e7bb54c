"""Transformer blocks with an expert for each modality: VLMo (arXiv:2111.02358), BEiT-3 (arXiv:2208.10442)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmcore.nn.attention import Attention, KeyValueCache, KeyValues, QKVBias, check_dropout, check_tokens
from mmcore.nn.linear import MLP, Linear
from mmcore.nn.transformer import residual
from mmcore.ops import attention, masks, require


def by_expert(x: Tensor, sizes: Sequence[int], *experts: nn.ModuleList) -> Tensor:
    """What each modality's experts, one after the other, make of its tokens: x [B, T, D], of which `sizes` are of each
    modality, one behind the other, to [B, T, ...]. An expert without tokens runs too, on none, so that all of a model's
    weights are in every forward."""
    num = len(experts[0])
    fits = len(sizes) == num and sum(sizes) == x.shape[1]
    require("MultiwayBlock", fits, "sizes must be {} that add up to {}, got {}", num, x.shape[1], sizes)
    parts = x.split(list(sizes), 1)
    for each in experts:
        parts = [expert(part) for expert, part in zip(each, parts, strict=True)]
    return torch.cat(list(parts), 1)


class MultiwayAttention(nn.Module):
    """Self-attention among the tokens of all modalities, each of which has projections of its own.

    Args:
        width: D, a multiple of `num_heads`.
        num_experts: as many as there are modalities.
        inner_norm: epsilon of a norm before the last projection, one a modality (Sub-LN, arXiv:2210.06423); None =
            there is none.
    """

    def __init__(self, width: int, num_heads: int, num_experts: int = 2, *, inner_norm: float | None = None) -> None:
        super().__init__()
        divides = num_heads >= 1 and width % num_heads == 0
        require("MultiwayAttention", divides, "num_heads must divide width {}, got {}", width, num_heads)
        self.num_heads, self.width = num_heads, width
        self.qkv = nn.ModuleList(Linear(width, 3 * width) for _ in range(num_experts))
        self.out = nn.ModuleList(Linear(width, width) for _ in range(num_experts))
        self.inner_norm = None
        if inner_norm is not None:
            self.inner_norm = nn.ModuleList(nn.LayerNorm(width, eps=inner_norm) for _ in range(num_experts))

    def forward(
        self, x: Tensor, sizes: Sequence[int], mask: masks.Mask | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; `sizes` as in `MultiwayBlock`, `mask` and `cache` as in `Attention`."""
        check_tokens("MultiwayAttention", "x", x, self.width)
        qkv = by_expert(x, sizes, self.qkv)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)  # each [B, T, H, K]
        if cache is not None:
            k, v = cache.extended(KeyValues(k, v))
        y = attention(q, k, v, mask=mask).flatten(2)
        last = (self.out,) if self.inner_norm is None else (self.inner_norm, self.out)
        return by_expert(y, sizes, *last)


class MultiwayBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP_m(LN_m(x)) by the expert of each token's modality m.

    Args:
        num_experts: as many as there are modalities, which may count "both at once" as one.
        layer_scale, drop_path, qkv_bias: see `Block`; a share of samples is left out of all experts' residuals alike.
        sub_norm: a norm before the last projection of the attention and of each feed-forward (Sub-LN,
            arXiv:2210.06423).
        decoupled: the attention's projections and its norms are one a modality too, as BEiT-3's weights have them.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        num_experts: int = 2,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        qkv_bias: QKVBias = "all",
        sub_norm: bool = False,
        decoupled: bool = False,
    ) -> None:
        super().__init__()
        op = "MultiwayBlock"
        check_dropout(op, drop_path)
        fits = not decoupled or qkv_bias == "all"
        require(op, fits, "qkv_bias must be 'all' with decoupled, got {!r}", qkv_bias)
        self.drop_path, self.decoupled, self.width = drop_path, decoupled, width

        def norms() -> nn.ModuleList:
            return nn.ModuleList(nn.LayerNorm(width, eps=norm_eps) for _ in range(num_experts))

        inner = norm_eps if sub_norm else None
        if decoupled:
            self.norm1 = norms()
            self.attn = MultiwayAttention(width, num_heads, num_experts, inner_norm=inner)
        else:
            self.norm1 = nn.LayerNorm(width, eps=norm_eps)
            self.attn = Attention(width, num_heads, qkv_bias=qkv_bias, inner_norm=inner)
        self.norms = norms()
        options = {"activation": activation, "inner_norm": inner}
        self.mlps = nn.ModuleList(MLP(width, mlp_dim, **options) for _ in range(num_experts))
        scales = [None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2)]
        self.scale1, self.scale2 = scales

    def forward(
        self, x: Tensor, sizes: Sequence[int], mask: masks.Mask | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """All tokens attend to all; each modality has its own feed-forward: [B, T, D].

        Args:
            x: [B, T, D], one modality behind the other.
            sizes: how many tokens each has, T in all; 0 for one that is absent.
            mask: of `mmkernels.masks`, for T queries and T keys, with a cache for the keys of both.
            cache: of what came before, to which `x` is added.
        """
        check_tokens("MultiwayBlock", "x", x, self.width)
        dropped = self.drop_path if self.training else 0.0
        if isinstance(self.attn, MultiwayAttention):
            assert isinstance(self.norm1, nn.ModuleList)
            y = self.attn(by_expert(x, sizes, self.norm1), sizes, mask, cache)
        else:
            y = self.attn(self.norm1(x), mask, cache)
        x = x + residual(y, self.scale1, dropped)
        return x + residual(by_expert(x, sizes, self.norms, self.mlps), self.scale2, dropped)
