"""Losses between two views of the same images, over all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.losses.contrastive import global_contrastive_loss
from mmcore.ops import require


def nt_xent_loss(
    first: Tensor, second: Tensor, temperature: float, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """SimCLR's loss: each of the 2B views of a global batch picks its partner among the 2B - 1 others,
    mean_i (log sum_{j != i} exp(s_ij) - s_ip), s = cosine / temperature.

    Every rank gets the same value, and gradients whose *mean* over ranks is that of one process.

    Args:
        first: projections of unit norm of one view of each image, `[B, D]`, float32, float16, bfloat16 or float64; B
            may differ among ranks.
        second: those of the other, the same shape.
        temperature: above 0.
        group: the data-parallel process group; None = the default one, or one process where none is set up.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError: other shapes, a temperature of 0 or less, and as `global_contrastive_loss`.

    Paper: arXiv:2002.05709.
    """
    fits = first.ndim == 2 and first.shape == second.shape
    got = f"{list(second.shape)} beside {list(first.shape)}"
    require("nt_xent_loss", fits, "second must be [B, D] as first, got {}", got)
    require("nt_xent_loss", temperature > 0, "temperature must be above 0, got {}", temperature)
    rows, partners = torch.cat([first, second]), torch.cat([second, first])
    own = torch.arange(len(rows), device=rows.device).roll(len(first))  # where a row is among the partners
    return global_contrastive_loss(rows, partners, 1 / temperature, symmetric=False, exclude=own, group=group)
