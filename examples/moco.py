"""MoCo (arXiv:1911.05722) in plain PyTorch, on scans of handwritten digits without their labels.

    python examples/moco.py [--steps 300]

Prints how many held-out digits the nearest of 50 labelled ones names rightly, by the encoder before and after.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mmcore.nn import FeatureQueue, MomentumEncoder
from mmkernels import contrastive_loss


class Encoder(nn.Module):
    """Images [B, 1, 8, 8] to unit-norm features [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, padding=1), nn.ReLU())
        self.layers = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64 * 16, 64))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.layers(images), dim=-1)


def view(images: Tensor) -> Tensor:
    """Each image turned, slanted, scaled and moved a little at random, and noise."""
    size = len(images)
    matrices = torch.eye(2) + 0.15 * torch.randn(size, 2, 2)
    maps = torch.cat([matrices, 0.1 * torch.randn(size, 2, 1)], 2)
    moved = F.grid_sample(images, F.affine_grid(maps, list(images.shape), False), align_corners=False)
    return moved + 0.1 * torch.randn_like(moved)


@torch.no_grad()
def accuracy(encoder: nn.Module, images: Tensor, labels: Tensor, num_labelled: int = 50) -> float:
    known, asked = encoder(images).tensor_split([num_labelled])
    return (labels[(asked @ known.T).argmax(1)] == labels[num_labelled:]).float().mean().item()


def main(steps: int) -> None:
    torch.manual_seed(0)
    digits: Any = load_digits()
    images, labels = torch.tensor(digits.images[:, None]).float() / 16, torch.tensor(digits.target)
    train, held_out = images[:1200], (images[1200:], labels[1200:])

    encoder = Encoder()
    momentum, queue = MomentumEncoder(encoder, 0.99), FeatureQueue(1024, 64)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    before = accuracy(encoder, *held_out)
    for step in range(1, steps + 1):
        batch = train[torch.randperm(len(train))[:128]]
        queries, keys = encoder(view(batch)), momentum(view(batch))
        loss = contrastive_loss(queries, keys, 1 / 0.2, symmetric=False, negatives=queue.filled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum.update()
        queue.enqueue(keys)
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(f"nearest neighbour: {before:.3f} before, {accuracy(momentum.teacher, *held_out):.3f} after")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
