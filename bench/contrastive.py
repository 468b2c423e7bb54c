"""What `mmkernels.contrastive_loss` is measured against: the loss as the field writes it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import contrastive_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """One product, as OpenAI's CLIP and transformers have it."""
    logits = scale * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def open_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Two products, as open_clip's ClipLoss has it on one process."""
    per_image, per_text = scale * a @ b.T, scale * b @ a.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def contenders() -> dict[str, Loss]:
    """By name; `torch.compile` is of the one-product form."""
    return {
        "mmkernels": contrastive_loss,
        "eager": eager,
        "open_clip": open_clip,
        "compile": torch.compile(eager, dynamic=False),
    }


def features(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-norm leaves as after some training: positive cosine about .3, scale 100."""
    generator = torch.Generator(device).manual_seed(0)
    a, noise = (
        F.normalize(torch.randn(num_rows, width, generator=generator, device=device), dim=-1)
        for _ in range(2)
    )
    b = F.normalize(0.3 * a + (1 - 0.3**2) ** 0.5 * noise, dim=-1)
    a, b = (x.to(dtype).requires_grad_() for x in (a, b))
    return a, b, torch.tensor(100.0, device=device, requires_grad=True)
