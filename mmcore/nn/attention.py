"""Self-attention, and what every attention module checks."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from mmcore.nn.linear import Linear
from mmcore.nn.packing import Packing
from mmcore.ops import attention, masks, require

QKVBias = Literal["all", "q and v"]
"""Which of queries, keys and values have a bias; that of keys changes no softmax, and BEiT leaves it out."""


class KeyValues(NamedTuple):
    """Projected states."""

    k: Tensor  # [B, Lk, Hkv, K]
    v: Tensor  # [B, Lk, Hkv, K]


class KeyValueCache:
    """The keys and values of the tokens that a layer has seen, for those that come after them."""

    def __init__(self) -> None:
        self.held: KeyValues | None = None

    def extended(self, new: KeyValues) -> KeyValues:
        """All so far and the new ones, held from now on."""
        if self.held is not None:
            new = KeyValues(*(torch.cat(pair, 1) for pair in zip(self.held, new, strict=True)))
        self.held = new
        return new

    def drop(self, count: int) -> None:
        """Forgets the last so many tokens."""
        if self.held is not None:
            self.held = KeyValues(*(x[:, : x.shape[1] - count] for x in self.held))

    def select(self, rows: Tensor) -> None:
        """Row r is from now on what row `rows[r]` was: int64 [R], of which some may be equal."""
        if self.held is not None:
            self.held = KeyValues(*(x.index_select(0, rows) for x in self.held))


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(K)) V, with one fused projection (arXiv:1706.03762).

    `qkv` holds the rows of q, then k, then v: the order of torch's and open_clip's `in_proj_weight`.

    Args:
        width: D, a multiple of `num_heads`.
        is_causal: each token sees itself and those before it.
        dropout: share of the attention weights that training drops, from 0, below 1.
        qkv_bias: which projections have one; of "q and v" they are `q_bias` and `v_bias`.
        inner_norm: epsilon of a norm before the last projection (Sub-LN, arXiv:2210.06423); None = there is none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        is_causal: bool = False,
        dropout: float = 0.0,
        qkv_bias: QKVBias = "all",
        inner_norm: float | None = None,
    ) -> None:
        super().__init__()
        divides = num_heads >= 1 and width % num_heads == 0
        require("Attention", divides, "num_heads must divide width {}, got {}", width, num_heads)
        check_dropout("Attention", dropout)
        self.num_heads, self.is_causal, self.dropout = num_heads, is_causal, dropout
        known = get_args(QKVBias)
        require("Attention", qkv_bias in known, "qkv_bias must be one of {}, got {!r}", known, qkv_bias)
        self.qkv = Linear(width, 3 * width, bias=qkv_bias == "all")
        biases = [nn.Parameter(torch.zeros(width)) if qkv_bias == "q and v" else None for _ in range(2)]
        self.q_bias, self.v_bias = biases
        self.out = Linear(width, width)
        self.inner_norm = None if inner_norm is None else nn.LayerNorm(width, eps=inner_norm)

    def forward(
        self,
        x: Tensor,
        mask: masks.Mask | None = None,
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Attention among the tokens of a row, and to those of a cache before them: [B, T, D].

        Args:
            x: [B, T, D].
            mask: of `mmkernels.masks`, for T queries and T keys, with a cache for the keys of both; with
                `is_causal` it narrows the causal one, and must be intervals (`masks.key_padding` among them). A
                token that sees nothing gets `out`'s bias.
            cache: of what came before, to which `x` is added.
            packing: of the rows that `x` [1, N, D] holds, causal as the attention is; without mask and cache.
        """
        check_tokens("Attention", "x", x, self.qkv.in_features)
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            qkv = qkv + bias.to(qkv.dtype)
        if packing is not None:
            got = packing.is_causal, mask is not None, cache is not None
            sentence = "packing must have is_causal={} and come without mask and cache, got {}, mask {}, cache {}"
            require("Attention", got == (self.is_causal, False, False), sentence, self.is_causal, *got)
            mask = packing.mask
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)  # each [B, T, H, K]
        if cache is not None:
            k, v = cache.extended(KeyValues(k, v))
        if self.is_causal and packing is None:
            causal = masks.causal(q.shape[1], k.shape[1], device=q.device)
            if isinstance(mask, masks.Dense):
                raise ValueError("Attention: mask must be intervals where is_causal, got a dense one")
            mask = causal if mask is None else causal & mask
        y = attention(q, k, v, mask=mask, dropout_p=self.dropout if self.training else 0.0).flatten(2)
        return self.out(y if self.inner_norm is None else self.inner_norm(y))


def check_tokens(op: str, name: str, x: Tensor, width: int) -> None:
    fits = x.ndim == 3 and x.shape[2] == width
    require(op, fits, "{} must be [B, L, {}], got shape {}", name, width, list(x.shape))


def check_dropout(op: str, dropout: float) -> None:
    require(op, 0 <= dropout < 1, "dropout must be from 0, below 1, got {}", dropout)
