"""Encoders for cached steps, in float64, their batch, and the losses of it by plain means."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.losses import (
    global_contrastive_loss,
    global_sigmoid_loss,
    global_token_contrastive_loss,
    gram_loss,
    koleo_loss,
    patch_distillation_loss,
    sinkhorn_knopp,
    view_distillation_loss,
)

NUM = 11
WEIGHTS = (1.0, 0.5, -1.5)
SHARES = {1: (11,), 2: (7, 4), 3: (5, 2, 4)}  # rows of each rank
WITH_NONE = {2: (0, 11), 3: (6, 0, 5)}


class Encoder(nn.Module):
    """Images [B, 4, 6], texts int [B, 3] or both to unit-norm features, and the scale."""

    def __init__(self, width: int = 5, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, width))
        self.text = nn.Embedding(9, width)
        self.logit_scale = nn.Parameter(torch.full((1,), 1.5))
        with torch.no_grad():
            for p in self.parameters():
                if p.numel() > 1:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
        self.to(dtype)

    def forward(self, images: Tensor | None = None, texts: Tensor | None = None) -> Any:
        """Tokens of one, or of both the means and exp(logit_scale)."""
        image = None if images is None else F.normalize(self.image(images), dim=-1)
        text = None if texts is None else F.normalize(self.text(texts), dim=-1)
        if image is None or text is None:
            return image if text is None else text
        return F.normalize(image.mean(1), dim=-1), F.normalize(text.mean(1), dim=-1), self.logit_scale.exp()


class OfTexts(nn.Module):
    """Texts as sentence-transformers' modules take and give them."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.text = encoder.text

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features | {"sentence_embedding": self.text(features["input_ids"]).mean(1)}


def logits() -> tuple[Tensor, Tensor]:
    """Of seven clusters."""
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, NUM, 7, generator=generator, dtype=torch.float64)
    return a, b


def distilled(rows: slice) -> dict[str, tuple[Tensor, Tensor]]:
    """The losses of self-distillation of these rows of the logits, and their gradients."""
    student, teacher = (x[rows] for x in logits())
    student.requires_grad_()
    shares = 1 / (1 + torch.arange(NUM, dtype=torch.float64)[rows] % 3)
    even = sinkhorn_knopp(teacher, 0.1)
    losses = {
        "views": view_distillation_loss([student, student.flip(1)], [teacher, 2 * teacher], 0.1, 0.05),
        "patches": patch_distillation_loss(student, teacher, shares, len(student), 0.1, 0.05),
        "even": patch_distillation_loss(student, even, shares, len(student), 0.1, 1.0),
        "apart": koleo_loss(student),
        "anchored": gram_loss(student[:, :6].unflatten(1, (3, 2)), teacher[:, 1:].unflatten(1, (3, 2))),
    }
    return {name: (x.detach(), torch.autograd.grad(x, student)[0]) for name, x in losses.items()}


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts, and which tokens of texts count."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(NUM, 4, 6, generator=generator, dtype=torch.float64).to(dtype)
    texts = torch.randint(0, 9, (NUM, 3), generator=generator)
    return images, texts, torch.rand(NUM, 3, generator=generator) < 0.7


def sigmoid(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return global_sigmoid_loss(image, text, scale, -2.0)


def late(image: Tensor, text: Tensor, *, scale: Tensor, mask: Tensor) -> Tensor:
    return global_token_contrastive_loss(image, text, scale.exp(), b_mask=mask)


def cases(model: Any, scale: Tensor, rows: slice) -> dict[str, tuple[list[Any], list[Any], Callable[..., Tensor]]]:
    """Encoders, inputs and loss by name; the model may be wrapped, `scale` is its log."""
    images, texts, mask = (x[rows] for x in batch(scale.dtype))

    def of_images(images: Tensor) -> Tensor:
        return model(images)

    def of_texts(texts: Tensor) -> Tensor:
        return model(texts=texts)

    return {
        "pairs": ([model], [(images, texts)], global_contrastive_loss),
        "pairs by name": ([model], [{"images": images, "texts": texts}], sigmoid),
        "two inputs": ([of_images, of_texts], [images, texts], partial(late, scale=scale, mask=mask)),
    }
