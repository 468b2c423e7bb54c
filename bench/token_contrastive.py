"""What `mmkernels.token_contrastive_loss` is measured against: BLIP-2's loss as the field writes it."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import token_contrastive_loss
from mmkernels._spec import Cost, Shape
from mmkernels.token_contrastive.spec import LOSS

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def positives_of(tokens: Tensor) -> Tensor:
    """A rank's: on the diagonal."""
    return torch.arange(len(tokens), device=tokens.device)


def ours(tokens: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return token_contrastive_loss(tokens, b, scale, positives=positives_of(tokens))


def eager(tokens: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """One product and one maximum for both directions."""
    logits = scale * (tokens.flatten(0, 1) @ b.T).unflatten(0, tokens.shape[:2]).max(1).values
    target = positives_of(tokens)
    of_rows = F.cross_entropy(logits, target)
    return (of_rows + F.cross_entropy(logits.T[: len(tokens)], target)) / 2


def lavis(tokens: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """LAVIS's Blip2Qformer: each direction has products and a maximum of its own."""
    of_images = torch.matmul(tokens.unsqueeze(1), b.unsqueeze(-1)).squeeze(-1)  # [M, N, Q]
    own = b[: len(tokens)]
    of_texts = torch.matmul(own.unsqueeze(1).unsqueeze(1), tokens.permute(0, 2, 1)).squeeze(-2)  # [M, M, Q]
    target = positives_of(tokens)
    of_rows = F.cross_entropy(scale * of_images.max(-1).values, target)
    return (of_rows + F.cross_entropy(scale * of_texts.max(-1).values, target)) / 2


def contenders() -> dict[str, Loss]:
    """By name; `torch.compile` is of the one-product form."""
    return {"mmkernels": ours, "eager": eager, "lavis": lavis, "compile": torch.compile(eager, dynamic=False)}


def features(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-norm leaves as after some training: a positive cosine of about .3 by one token, scale 14.3 (BLIP-2's
    temperature is .07)."""
    num_rows, num_tokens, num_cols, width = shape
    generator = torch.Generator(device).manual_seed(0)
    tokens, b = (
        F.normalize(torch.randn(*size, width, generator=generator, device=device), dim=-1)
        for size in ((num_rows, num_tokens), (num_cols,))
    )
    tokens[:, 0] = F.normalize(0.3 * b[:num_rows] + (1 - 0.3**2) ** 0.5 * tokens[:, 0], dim=-1)
    tokens, b = (x.to(dtype).requires_grad_() for x in (tokens, b))
    return tokens, b, torch.tensor(1 / 0.07, device=device, requires_grad=True)


def cost(shape: Shape, tokens: Tensor) -> tuple[Cost, Cost]:
    """`LOSS.cost` of the form that is run: on a CPU one of the Q products of a pair counts in the gradients."""
    forward, backward = LOSS.cost(shape, tokens.element_size())
    if tokens.is_cpu:
        backward = replace(backward, flops=int((1 + 2 / shape["Q"]) * forward.flops))
    return forward, backward
