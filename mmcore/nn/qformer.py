"""A layer of BLIP-2's Q-Former: learned queries that read an image, beside a text."""

import torch
from torch import Tensor, nn

from mmcore.nn.attention import Attention, KeyValueCache, KeyValues
from mmcore.nn.cross import CrossAttention
from mmcore.nn.linear import MLP
from mmcore.ops import masks


class AddNorm(nn.Module):
    """LN(x + dropout(y)), BERT's residual."""

    def __init__(self, width: int, *, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(x + self.dropout(y))


class QFormerBlock(nn.Module):
    """Self-attention of [queries; text], attention of the queries to an image, and an MLP for queries and for text.

    Each is followed by LN(x + dropout(y)), as in BERT (BLIP-2, arXiv:2301.12597).

    Args:
        width: D of queries and text.
        image_width: D of the image's states; None = a block that does not look at the image (every other one,
            as published).
        has_text: False leaves out the text's MLP.
        dropout: of what is added to the residual, in training.
        attention_dropout: share of the attention weights that training drops, from 0, below 1.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        image_width: int | None,
        has_text: bool = True,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()

        def add_norm() -> AddNorm:
            return AddNorm(width, dropout=dropout, norm_eps=norm_eps)

        self.attn = Attention(width, num_heads, dropout=attention_dropout)
        self.attn_norm = add_norm()
        self.cross = None
        if image_width is not None:
            self.cross = CrossAttention(width, num_heads, key_width=image_width, dropout=attention_dropout)
            self.cross_norm = add_norm()
        self.query_mlp = MLP(width, mlp_dim)
        self.query_norm = add_norm()
        self.text_mlp = None
        if has_text:
            self.text_mlp = MLP(width, mlp_dim)
            self.text_norm = add_norm()

    def forward(
        self,
        x: Tensor,
        image: Tensor | KeyValues | None = None,
        *,
        num_queries: int | None = None,
        mask: masks.Mask | None = None,
        image_mask: masks.Mask | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """One layer over `[queries; text]`: [B, Q + T, D].

        Args:
            x: [B, Q + T, D], the queries first.
            image: [B, P, D_image] or `self.cross.keys_values` of it, for the queries of a block that looks at it.
            num_queries: Q, 0 for text alone; None = all of `x`.
            mask: among queries and text, such as `mmkernels.masks.qformer_itc`, `_itm` or `_itg`.
            image_mask: for Q queries and P keys.
            cache: of queries and text that came before; `mask` is then for the keys of both.
        """
        num_queries = x.shape[1] if num_queries is None else num_queries
        x = self.attn_norm(x, self.attn(x, mask, cache))
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if self.cross is not None and num_queries > 0:
            if image is None:
                raise ValueError("QFormerBlock: image must be given to a block that looks at it, got None")
            queries = self.cross_norm(queries, self.cross(queries, image, image_mask))
        queries = self.query_norm(queries, self.query_mlp(queries))
        if text.shape[1] == 0:
            return queries
        if self.text_mlp is None:
            raise ValueError(f"QFormerBlock: x must hold no text without has_text, got {text.shape[1]} tokens")
        return torch.cat([queries, self.text_norm(text, self.text_mlp(text))], 1)
