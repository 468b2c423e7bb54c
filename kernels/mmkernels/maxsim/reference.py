"""MaxSim in eager PyTorch, in the dtype it is given: what every other path is measured against."""

import torch
from torch import Tensor


def maxsim_ref(q: Tensor, d: Tensor, *, q_mask: Tensor | None = None, d_mask: Tensor | None = None) -> Tensor:
    """`S_bn = sum_i max_t <q_bi, d_nt>` over the tokens that count, arguments as in `maxsim`; of equal products the
    first takes the gradient."""
    products = torch.einsum("bik,ntk->bnit", q, d)
    if d_mask is None:
        d_mask = torch.ones(d.shape[:2], dtype=torch.bool, device=d.device)
    best = products.masked_fill(~d_mask[:, None, :], -torch.inf).max(3).values  # [B, N, Lq]
    best = best.masked_fill(~d_mask.any(1)[:, None], 0)
    return (best if q_mask is None else best.masked_fill(~q_mask[:, None], 0)).sum(2)
