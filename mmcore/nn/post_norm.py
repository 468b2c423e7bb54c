"""A post-LN transformer layer, BERT's."""

from collections.abc import Callable

from torch import Tensor, nn

from mmcore.nn.attention import Attention, KeyValueCache, KeyValues
from mmcore.nn.cross import CrossAttention
from mmcore.nn.linear import MLP
from mmcore.nn.qformer import AddNorm
from mmcore.ops import masks


class PostNormBlock(nn.Module):
    """LN(x + attention(x)), LN(x + attention(x, image)) where there is an image, LN(x + MLP(x)) (BERT,
    arXiv:1810.04805; with the image, ALBEF's and BLIP's, arXiv:2107.07651).

    Args:
        image_width: D of the states of an image that it may read; None = it has no such attention.
        has_decoder: a second self-attention with its norm, for texts that are generated, which share all else (BLIP,
            arXiv:2201.12086).
        dropout: of what is added to the residual, in training.
        attention_dropout: share of the attention weights that training drops, from 0, below 1.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        image_width: int | None = None,
        has_decoder: bool = False,
        activation: str = "gelu",
        norm_eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()

        def add_norm() -> AddNorm:
            return AddNorm(width, dropout=dropout, norm_eps=norm_eps)

        self.attn = Attention(width, num_heads, dropout=attention_dropout)
        self.attn_norm = add_norm()
        self.decoder_attn = Attention(width, num_heads, dropout=attention_dropout) if has_decoder else None
        self.decoder_attn_norm = add_norm() if has_decoder else None
        self.cross = None
        if image_width is not None:
            self.cross = CrossAttention(width, num_heads, key_width=image_width, dropout=attention_dropout)
            self.cross_norm = add_norm()
        self.mlp = MLP(width, mlp_dim, activation=activation)
        self.mlp_norm = add_norm()

    def forward(
        self,
        x: Tensor,
        mask: masks.Mask | None = None,
        pool: Callable[[Tensor], Tensor] | None = None,
        *,
        image: Tensor | KeyValues | None = None,
        image_mask: masks.Mask | None = None,
        cache: KeyValueCache | None = None,
        decodes: bool = False,
    ) -> Tensor:
        """[B, T, D] to [B, T, D], or to what `pool` takes of it: what follows the attention is computed for that alone.

        Args:
            x: [B, T, D].
            mask: for T queries and T keys, with a cache for the keys of both.
            pool: see above.
            image: [B, P, D_image] or `self.cross.keys_values` of it; None = text alone, in any layer.
            image_mask: for T queries, or those that `pool` takes, and P keys.
            cache: of the text that came before.
            decodes: by the second self-attention, of a block that has one.
        """
        attn, norm = (self.decoder_attn, self.decoder_attn_norm) if decodes else (self.attn, self.attn_norm)
        if attn is None or norm is None:
            raise ValueError("PostNormBlock: decodes must be False without has_decoder, got True")
        x = norm(x, attn(x, mask, cache))
        x = x if pool is None else pool(x)
        if image is not None:
            if self.cross is None:
                raise ValueError("PostNormBlock: image must be None without image_width, got one")
            x = self.cross_norm(x, self.cross(x, image, image_mask))
        return self.mlp_norm(x, self.mlp(x))
