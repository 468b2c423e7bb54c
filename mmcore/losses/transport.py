"""Optimal transport between words and patches: what ViLT and UNITER align them by."""

import torch
from torch import Tensor

from mmcore.ops import require


@torch.no_grad()
def transport_plan(cost: Tensor, rows: Tensor, columns: Tensor, *, beta: float = 0.5, num_steps: int = 50) -> Tensor:
    """The plan of least `<T, cost>` between uniform weights of rows and of columns, by the inexact proximal point
    method (IPOT, arXiv:1802.04307): float32 `[B, N, M]`, 0 where either is padding, all 0 where a side has nothing.

    Args:
        cost: `[B, N, M]`.
        rows: bool `[B, N]`, which are no padding.
        columns: bool `[B, M]`, likewise.
        beta: of the proximal term, above 0.
        num_steps: of the method, at least 1.
    """
    op = "transport_plan"
    sizes = list(cost.shape)
    for name, x, wanted in (("rows", rows, sizes[:2]), ("columns", columns, [*sizes[:1], *sizes[2:]])):
        fits = cost.ndim == 3 and x.dtype == torch.bool and list(x.shape) == wanted
        require(op, fits, "{} must be bool {} of a cost {}, got {} {}", name, wanted, sizes, x.dtype, list(x.shape))
    require(op, beta > 0, "beta must be above 0, got {}", beta)
    require(op, num_steps >= 1, "num_steps must be at least 1, got {}", num_steps)
    wide = torch.promote_types(cost.dtype, torch.float32)
    num_rows, num_columns = (x.sum(1, keepdim=True).to(wide) for x in (rows, columns))  # [B, 1]
    both = (rows[:, :, None] & columns[:, None]).to(wide)
    near = (-cost.to(wide) / beta).exp() * both
    plan, of_rows = both, rows.to(wide) / num_rows.clamp(min=1)  # [B, N]
    for _ in range(num_steps):
        moved = near * plan
        of_columns = _inverse(num_columns * torch.einsum("bnm,bn->bm", moved, of_rows), columns)
        of_rows = _inverse(num_rows * torch.einsum("bnm,bm->bn", moved, of_columns), rows)
        plan = of_rows[:, :, None] * moved * of_columns[:, None]
    return plan


def _inverse(x: Tensor, seen: Tensor) -> Tensor:
    """1 / x, 0 where it is padding or has nothing to be moved to."""
    return torch.where(seen & (x > 0), 1 / x, 0)


def transport_distance(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`<T, 1 - cos(x_n, y_m)>` of each sample, with the plan T of `transport_plan`, which has no gradient.

    Args:
        x: `[B, N, D]`.
        y: `[B, M, D]`.
        rows, columns: bool `[B, N]` and `[B, M]`, which are no padding.

    Returns:
        `[B]`, float32 or wider.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        x, y = (torch.nn.functional.normalize(z.to(wide), dim=-1, eps=1e-5) for z in (x, y))
        cost = 1 - x @ y.transpose(1, 2)
        cost = cost.masked_fill(~(rows[:, :, None] & columns[:, None]), 0)
        return (cost * transport_plan(cost, rows, columns)).sum((1, 2))
