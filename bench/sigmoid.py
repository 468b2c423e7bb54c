"""What `mmkernels.sigmoid_loss` is measured against: the loss as the field writes it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contrastive import features
from bench.peers import load, missing
from mmkernels import sigmoid_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """All logits and a matrix of signs, as open_clip's SigLipLoss has it on one process."""
    logits = scale * a @ b.T + bias
    signs = 2 * torch.eye(len(a), device=a.device, dtype=a.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(a)


def contenders() -> dict[str, Loss]:
    """By name, siglip-kernel, which takes the scale's logarithm, among them where it is here."""
    losses: dict[str, Loss] = {
        "mmkernels": sigmoid_loss,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    if missing("siglip-kernel") is None:
        fused = load("siglip-kernel").fused_siglip_loss
        losses["siglip-kernel"] = lambda a, b, scale, bias: fused(a, b, scale.log(), bias)
    return losses


def trained(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit-norm leaves as after some training: positive cosine about .3, scale 100, bias -13."""
    return *features(num_rows, width, dtype, device), torch.tensor(-13.0, device=device, requires_grad=True)
