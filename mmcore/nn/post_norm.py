"""A post-LN transformer layer, BERT's."""

from collections.abc import Callable

from torch import Tensor, nn

from mmcore.nn.attention import Attention
from mmcore.nn.linear import MLP
from mmcore.nn.qformer import AddNorm
from mmcore.ops import masks


class PostNormBlock(nn.Module):
    """LN(x + attention(x)), then LN(x + MLP(x)) (BERT, arXiv:1810.04805)."""

    def __init__(
        self, width: int, num_heads: int, mlp_dim: int, *, activation: str = "gelu", norm_eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.attn_norm = AddNorm(width, dropout=0.0, norm_eps=norm_eps)
        self.mlp = MLP(width, mlp_dim, activation=activation)
        self.mlp_norm = AddNorm(width, dropout=0.0, norm_eps=norm_eps)

    def forward(
        self, x: Tensor, mask: masks.Mask | None = None, pool: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D], or to what `pool` takes of it: the feed-forward is computed for that alone."""
        x = self.attn_norm(x, self.attn(x, mask))
        x = x if pool is None else pool(x)
        return self.mlp_norm(x, self.mlp(x))
