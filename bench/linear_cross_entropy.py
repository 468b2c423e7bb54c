"""What `mmkernels.linear_cross_entropy` is measured against: the loss as the field writes it, and its peers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import load, missing
from mmkernels import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
PEERS = ("liger", "cut_cross_entropy")


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The logits whole, the loss in float32, as transformers has it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def contenders() -> dict[str, Loss]:
    """By name, the peers that are here among them."""
    found: dict[str, Loss] = {
        "mmkernels": linear_cross_entropy,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    if missing("liger") is None:
        liger = load("liger").LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        found["liger"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    if missing("cut_cross_entropy") is None:
        found["cut_cross_entropy"] = load("cut_cross_entropy").linear_cross_entropy
    return found


def head(
    num_rows: int, width: int, vocab: int, ignored_percent: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves hidden and weight, with logits of deviation 1, and targets of which a share is ignored."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator, device=device)
    weight = torch.randn(vocab, width, generator=generator, device=device) / width**0.5
    targets = torch.randint(vocab, (num_rows,), generator=generator, device=device)
    # an image's tokens come first, as LLaVA's do
    targets[: num_rows * ignored_percent // 100] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets
