"""Attention as the field writes it: the truth, in the dtype it is given; it stores every matrix."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import accumulator
from mmkernels._philox import kept
from mmkernels.masks import Mask


class QKNorm(NamedTuple):
    """RMSNorm of queries and keys over the head dimension: `x / sqrt(mean(x^2) + eps) * weight`.

    As Llama-3.2-Vision's cross-attention and Qwen3's attention have it (arXiv:1910.07467).
    """

    q_weight: Tensor  # [K]
    k_weight: Tensor  # [K]
    eps: float = 1e-6

    def apply(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_query(q), self.of_key(k)

    def of_query(self, q: Tensor) -> Tensor:
        return F.rms_norm(q, q.shape[-1:], self.q_weight.to(q.dtype), self.eps)

    def of_key(self, k: Tensor) -> Tensor:
        return F.rms_norm(k, k.shape[-1:], self.k_weight.to(k.dtype), self.eps)


def attention_ref(
    q: Tensor,
    k: Tensor | tuple[Tensor, Tensor],
    v: Tensor | tuple[Tensor, Tensor],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    gate: Tensor | None = None,
    qk_norm: QKNorm | None = None,
    empty_rows: str = "zero",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`tanh(gate) softmax(scale q k^T + bias) v`, see `mmkernels.attention`; `backend` has no say here."""
    k, v = (torch.cat(x, 1) if isinstance(x, tuple) else x for x in (k, v))
    if qk_norm is not None:
        q, k = qk_norm.apply(q, k)
    batch = k.shape[0]
    q = q.expand(batch, -1, -1, -1)
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    wide = accumulator(q.dtype)
    logits = torch.einsum("bihd,bjhd->bhij", q, k).to(wide) * factor
    num_rows, num_cols = logits.shape[2:]
    rows, cols = (torch.arange(n, device=q.device) for n in (num_rows, num_cols))
    if alibi_slopes is not None:
        distance = (rows[:, None] + (num_cols - num_rows) - cols).abs()
        logits = logits - alibi_slopes.to(wide).reshape(-1, logits.shape[1], 1, 1) * distance
    if mask is not None:
        values = mask.to_dense()
        if values.dtype == torch.bool:
            logits = logits.masked_fill(~values, -torch.inf)
        else:
            logits = logits + values.to(wide)
    empty = (logits == -torch.inf).all(3)
    logits = logits.masked_fill(empty[..., None], 0.0)
    weights = logits.softmax(3)
    lse = logits.logsumexp(3).masked_fill(empty, -torch.inf)
    if dropout_p > 0:
        assert seed is not None
        heads = torch.arange(batch * logits.shape[1], device=q.device).view(batch, -1)
        keep = kept(seed.to(q.device), dropout_p, heads, rows, cols)
        weights = torch.where(keep, weights / (1 - dropout_p), 0.0)
    weights = weights.masked_fill(empty[..., None], 0.0 if empty_rows == "zero" else 1 / max(num_cols, 1))
    out = torch.einsum("bhij,bjhd->bihd", weights.to(q.dtype), v)
    if gate is not None:
        out = out * gate.to(q.dtype).tanh().reshape(-1, 1)
    return (out, lse) if return_lse else out
