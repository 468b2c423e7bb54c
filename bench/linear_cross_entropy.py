"""What `mmkernels.linear_cross_entropy` is measured against: the loss as the field writes it, and its peers."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import linear_cross_entropy

if find_spec("liger_kernel") and torch.cuda.is_available():
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
else:
    LigerFusedLinearCrossEntropyLoss = None
if find_spec("cut_cross_entropy") and torch.cuda.is_available():
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
else:
    cut_cross_entropy = None

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
PEERS = ("liger", "cut_cross_entropy")


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The logits whole, the loss in float32, as transformers has it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def contenders() -> dict[str, Loss]:
    """By name; the peers run on a GPU only, where they are installed."""
    found: dict[str, Loss] = {
        "mmkernels": linear_cross_entropy,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    if LigerFusedLinearCrossEntropyLoss is not None:
        liger = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        found["liger"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    if cut_cross_entropy is not None:
        found["cut_cross_entropy"] = cut_cross_entropy
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
