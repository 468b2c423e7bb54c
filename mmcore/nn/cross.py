"""Attention to the states of an encoder, whose keys and values can be computed once for many calls and layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.nn.attention import KeyValues, check_dropout, check_tokens
from mmcore.nn.linear import MLP, Linear
from mmcore.ops import attention, masks, require


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each head; autocast leaves the weight in float32, and torch's fused kernel wants one dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to an encoder's states, softmax(Q K^T / sqrt(K)) V (arXiv:1706.03762).

    `kv` holds the rows of k, then v, each head by head.

    Args:
        width: D of the tokens.
        key_width: D of the states; None = `width`.
        head_dim: K; None = `width / num_heads`.
        num_key_heads: Hkv, divides `num_heads` (grouped-query attention); None = `num_heads`.
        qk_norm: RMSNorm of each head's q and k, as Llama-3.2-Vision.
        bias: of all projections.
        dropout: share of the attention weights that training drops, from 0, below 1.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        key_width: int | None = None,
        head_dim: int | None = None,
        num_key_heads: int | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        op = "CrossAttention"
        divides = num_heads >= 1 and (head_dim is not None or width % num_heads == 0)
        require(op, divides, "num_heads must divide width {}, got {}", width, num_heads)
        head_dim = width // num_heads if head_dim is None else head_dim
        key_heads = num_heads if num_key_heads is None else num_key_heads
        divides = key_heads >= 1 and num_heads % key_heads == 0
        require(op, divides, "num_key_heads must divide num_heads {}, got {}", num_heads, key_heads)
        check_dropout(op, dropout)
        self.num_heads, self.num_key_heads, self.dropout = num_heads, key_heads, dropout
        self.q = Linear(width, num_heads * head_dim, bias=bias)
        self.kv = Linear(width if key_width is None else key_width, 2 * key_heads * head_dim, bias=bias)
        self.out = Linear(num_heads * head_dim, width, bias=bias)
        self.q_norm = HeadNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, states: Tensor | KeyValues | tuple[KeyValues, KeyValues], mask: masks.Mask | None = None
    ) -> Tensor:
        """What each token reads from the states: [B, Lq, D].

        Args:
            x: [B, Lq, D], or [1, Lq, D] for tokens that all rows share.
            states: [B, Lk, D_k], or the `keys_values` of them, a pair of which stands for their concatenation.
            mask: of `mmkernels.masks`, for Lq queries and Lk keys. A token that sees nothing gets `out`'s bias.
        """
        check_tokens("CrossAttention", "x", x, self.q.in_features)
        if isinstance(states, Tensor):
            states = self.keys_values(states)
        if isinstance(states, KeyValues):
            k, v = states
        else:
            (k1, v1), (k2, v2) = states
            k, v = (k1, k2), (v1, v2)
        q = self.q_norm(self.q(x).unflatten(2, (self.num_heads, -1)))  # [B, Lq, H, K]
        y = attention(q, k, v, mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.flatten(2))

    def keys_values(self, states: Tensor) -> KeyValues:
        """The keys, normed, and the values of states `[B, Lk, D_k]`, for as many calls as read them."""
        check_tokens("CrossAttention", "states", states, self.kv.in_features)
        return self.split_heads(self.kv(states))

    def split_heads(self, kv: Tensor) -> KeyValues:
        """`[B, Lk, 2 Hkv K]`, as `kv` projects the states, to keys, normed, and values."""
        k, v = kv.unflatten(2, (2, self.num_key_heads, -1)).unbind(2)
        return KeyValues(self.k_norm(k), v)


def shared_keys_values(states: Tensor, layers: Sequence[CrossAttention]) -> list[KeyValues]:
    """`[layer.keys_values(states) for layer in layers]` of [B, Lk, D_k] and layers of one `key_width` and `bias`, on a
    GPU with one matrix product for all of them.

    For a GPU that one layer's product leaves idle; on a CPU the copy of all weights into one matrix costs more than
    it saves, and each layer has its own product. The weights of one product are read outside the forward of their
    layers: ZeRO-3 must be told to gather them.
    """
    op = "shared_keys_values"
    kinds = {(layer.kv.in_features, layer.kv.bias is not None) for layer in layers}
    require(op, len(kinds) == 1, "layers must be of one key_width and bias, got {}", sorted(kinds))
    check_tokens(op, "states", states, layers[0].kv.in_features)
    if states.is_cpu:
        return [layer.keys_values(states) for layer in layers]
    return by_one_product(states, layers)


def by_one_product(states: Tensor, layers: Sequence[CrossAttention]) -> list[KeyValues]:
    """`shared_keys_values` of checked arguments, on any device."""
    projections = [layer.kv for layer in layers]
    weight = torch.cat([kv.weight for kv in projections])
    bias = None if projections[0].bias is None else torch.cat([kv.bias for kv in projections])
    parts = F.linear(states, weight, bias).split([kv.out_features for kv in projections], 2)
    return [layer.split_heads(kv) for layer, kv in zip(layers, parts, strict=True)]


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
        """
        check_tokens("GatedCrossAttentionBlock", "x", x, self.attn.q.in_features)
        x = x + self.attn_gate.tanh() * self.attn(self.norm1(x), media, mask)
        return x + self.mlp_gate.tanh() * self.mlp(self.norm2(x))
