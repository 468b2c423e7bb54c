"""Flamingo's gated cross-attention, by which a frozen language model reads images."""

import torch
from torch import Tensor, nn

from mmcore.nn.attention import check_tokens
from mmcore.nn.cross import CrossAttention, KeyValues
from mmcore.nn.mlp import MLP
from mmcore.ops import masks


class GatedCrossAttentionBlock(nn.Module):
    """x + tanh(a) attention(LN(x), media), then x + tanh(b) MLP(LN(x)) (Flamingo, arXiv:2204.14198).

    The gates a and b start at 0, and the block as the identity. The projections have no bias, so that text that
    sees no image takes nothing from the attention.

    Args:
        width: D of the text.
        media_width: D of the media; None = `width`.
        head_dim: K; None = `width / num_heads`.
    """

    def __init__(
        self, width: int, num_heads: int, mlp_dim: int, *, media_width: int | None = None, head_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = CrossAttention(width, num_heads, key_width=media_width, head_dim=head_dim, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_dim, bias=False)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, media: Tensor | KeyValues, mask: masks.Mask | None = None) -> Tensor:
        """Text [B, T, D] that reads the images before it: [B, T, D].

        Args:
            media: [B, L, D_media], image by image, or `self.attn.keys_values` of them.
            mask: `mmkernels.masks.media`, made once for all blocks; None = all text sees all media.

        Raises:
            ValueError: a wrong shape or mask.
        """
        check_tokens("GatedCrossAttentionBlock", "x", x, self.attn.q.in_features)
        x = x + self.attn_gate.tanh() * self.attn(self.norm1(x), media, mask)
        return x + self.mlp_gate.tanh() * self.mlp(self.norm2(x))
