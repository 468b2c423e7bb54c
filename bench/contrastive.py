"""What `mmkernels.contrastive_loss` is measured against: the loss as the field writes it."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

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


def inf_cl(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Inf-CL's one-sided Triton loss, once a direction; it has no process group to reduce over on one GPU."""
    cal_flash_loss = import_module("inf_cl").cal_flash_loss
    return (cal_flash_loss(a, b, scale=scale) + cal_flash_loss(b, a, scale=scale)) / 2


def cut_cross_entropy(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Apple's linear cross-entropy, once a direction, without its skipping of small probabilities."""
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy
    target = torch.arange(len(a), device=a.device)
    scaled = (scale * a).to(a.dtype)
    rows = linear_cross_entropy(scaled, b, target, filter_eps=None)
    return (rows + linear_cross_entropy((scale * b).to(b.dtype), a, target, filter_eps=None)) / 2


def peers() -> dict[str, Loss]:
    """Those that are installed; both run on GPUs only."""
    found = {"inf_cl": inf_cl} if find_spec("inf_cl") else {}
    return found | ({"cut_cross_entropy": cut_cross_entropy} if find_spec("cut_cross_entropy") else {})


def contenders() -> dict[str, Loss]:
    """By name; `torch.compile` is of the one-product form."""
    return peers() | {
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
