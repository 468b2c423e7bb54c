"""What `mmkernels.contrastive_loss` is measured against: the loss as the field writes it."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import load, missing
from mmkernels import contrastive_loss
from mmkernels._spec import Cost
from mmkernels.contrastive.op import logits_are_kept
from mmkernels.contrastive.spec import contrastive_cost

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
    """Inf-CL's one-sided Triton loss of each row, once a direction, in the largest heads that it knows."""
    cal_flash_loss, head = load("inf_cl").cal_flash_loss, 256 if a.shape[1] % 256 == 0 else 128
    rows, cols = (cal_flash_loss(*x, scale=scale, head_dim=head).mean() for x in ((a, b), (b, a)))
    return (rows + cols) / 2


def cut_cross_entropy(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Apple's linear cross-entropy, once a direction, without its skipping of small probabilities."""
    linear_cross_entropy = load("cut_cross_entropy").linear_cross_entropy
    target = torch.arange(len(a), device=a.device)
    scaled = (scale * a).to(a.dtype)
    rows = linear_cross_entropy(scaled, b, target, filter_eps=None)
    return (rows + linear_cross_entropy((scale * b).to(b.dtype), a, target, filter_eps=None)) / 2


def sentence_transformers(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """CachedMultipleNegativesRankingLoss of both directions, which is eager, 1,024 rows at a time."""
    loss = load("sentence_transformers").CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()),
        scale=1.0,
        similarity_fct=lambda x, y: scale * x @ y.T,
        mini_batch_size=1024,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    return loss.calculate_loss([[a], [b]])


PEERS: Mapping[str, Loss] = {
    "inf_cl": inf_cl,
    "cut_cross_entropy": cut_cross_entropy,
    "sentence_transformers": sentence_transformers,
}


def contenders() -> dict[str, Loss]:
    """By name, the peers that are here among them; `torch.compile` is of the one-product form."""
    return {name: loss for name, loss in PEERS.items() if missing(name) is None} | {
        "mmkernels": contrastive_loss,
        "eager": eager,
        "open_clip": open_clip,
        "compile": torch.compile(eager, dynamic=False),
    }


def features(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-norm leaves as after some training: positive cosine about .3, scale 100."""
    generator = torch.Generator(device).manual_seed(0)
    a, noise = (F.normalize(torch.randn(num_rows, width, generator=generator, device=device), dim=-1) for _ in range(2))
    b = F.normalize(0.3 * a + (1 - 0.3**2) ** 0.5 * noise, dim=-1)
    a, b = (x.to(dtype).requires_grad_() for x in (a, b))
    return a, b, torch.tensor(100.0, device=device, requires_grad=True)


def cost(a: Tensor, num_cols: int, learned: float = 1.0) -> tuple[Cost, Cost]:
    """`contrastive_cost` of the form that is run: the logits again where they are not kept, the gradients of the rows,
    and those of a share of the columns."""
    forward, backward = contrastive_cost(len(a), num_cols, a.shape[1], a.element_size())
    products = (not logits_are_kept(a, num_cols)) + 1 + learned
    return forward, replace(backward, flops=int(products * forward.flops))
