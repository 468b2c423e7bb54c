"""A sequence of any length pooled into a fixed number of tokens."""

import torch
from torch import Tensor, nn

from mmcore.nn.attention import check_tokens
from mmcore.nn.cross import CrossAttention
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
        """One result a query: [B, L, D_k] to [B, Q, D].

        Args:
            mask: of `mmkernels.masks`, for Q queries and L keys, such as `masks.lengths`.

        Raises:
            ValueError: a wrong shape or mask.
        """
        check_tokens("AttentionalPooler", "x", x, self.attn.kv.in_features)
        queries = self.query_norm(self.queries)[None]  # [1, Q, D], one for the whole batch
        return self.attn(queries, self.key_norm(x), mask)
