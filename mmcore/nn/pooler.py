"""A sequence of any length pooled into a fixed number of tokens."""

import torch
from torch import Tensor, nn

from mmcore.nn.attention import check_tokens
from mmcore.nn.cross import CrossAttention
from mmcore.nn.mlp import MLP
from mmcore.ops import masks


class AttentionalPooler(nn.Module):
    """attention(LN(queries), LN(x)) with learned queries (CoCa, arXiv:2205.01917).

    Args:
        width: D of the queries and of the result.
        key_width: D of what is pooled; None = `width`.
    """

    def __init__(self, width: int, num_queries: int, num_heads: int, *, key_width: int | None = None) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width if key_width is None else key_width)
        self.attn = CrossAttention(width, num_heads, key_width=key_width)

    def forward(self, x: Tensor, mask: masks.Mask | None = None) -> Tensor:
        """One result a query.

        Args:
            x: [B, L, D_k].
            mask: of `mmkernels.masks`, for Q queries and L keys, such as `masks.lengths`.

        Returns:
            [B, Q, D].

        Raises:
            ValueError: a wrong shape or mask.
        """
        check_tokens("AttentionalPooler", "x", x, self.attn.kv.in_features)
        queries = self.query_norm(self.queries)[None]  # [1, Q, D], one for the whole batch
        return self.attn(queries, self.key_norm(x), mask)


class PoolingHead(nn.Module):
    """One state of many by a learned query, y = attention(probe, x), then y + MLP(LN(y)): SigLIP's (arXiv:2303.15343).

    Args:
        width: D.
        mlp_dim, activation: of the MLP.
    """

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, activation: str, norm_eps: float) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(width) * width**-0.5)
        self.attn = CrossAttention(width, num_heads)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, mlp_dim, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] to [B, D]."""
        y = self.attn(self.probe[None, None], x)[:, 0]
        return y + self.mlp(self.norm(y))
