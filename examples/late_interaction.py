"""Pages found by queries as ColPali finds them: every token of a query against the best patch of a page, and the mean.

    python examples/late_interaction.py [--steps 60]
    torchrun --nproc_per_node 2 examples/late_interaction.py

The batch is 256 pages and queries of all ranks, encoded 64 at a time: `cached_contrastive_step` gives the gradient of
the whole batch all the same. The pages are scans of handwritten digits in patches of 2 x 2 pixels, the towers stand for
a vision-language model whose states of all tokens are projected. Prints the share of the ten best pages of each query
that show what it asks for, on held-out scans.
"""

import argparse
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmcore.losses import cached_contrastive_step, global_token_contrastive_loss
from mmkernels import maxsim

WORDS = "[PAD] a page with the number zero one two three four five six seven eight nine".split()
BATCH, CHUNK = 256, 64


class Encoder(nn.Module):
    """Pages [B, 16, 4] or queries int64 [B, T] to unit-norm tokens [B, 16, D] or [B, T, D]."""

    def __init__(self, width: int = 64, dim: int = 32) -> None:
        super().__init__()
        layer = partial(nn.TransformerEncoderLayer, width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.patches, self.places = nn.Linear(4, width), nn.Parameter(0.1 * torch.randn(16, width))
        self.words = nn.Embedding(len(WORDS), width, padding_idx=0)
        self.page, self.query, self.proj = layer(), layer(), nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            states = self.page(self.patches(x) + self.places)
        else:
            states = self.query(self.words(x), src_key_padding_mask=x == 0)
        return F.normalize(self.proj(states), dim=-1)


def pages() -> tuple[Tensor, Tensor]:
    """Scans as patches [N, 16, 4], and the digits."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images).float() / 16
    return images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), 16, 4), torch.tensor(digits.target)


def queries(labels: Tensor) -> Tensor:
    """`a page with the number seven`, or `seven` alone and padding, [B, 6]."""
    long = torch.cat([torch.arange(1, 6).expand(len(labels), -1), 6 + labels[:, None]], 1)
    short = F.pad(6 + labels[:, None], (0, 5))
    return torch.where(torch.arange(len(labels))[:, None] % 2 == 0, long, short)


def main(steps: int) -> None:
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world_size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    (images, labels), encoder = pages(), Encoder()
    model = DistributedDataParallel(encoder) if world_size > 1 else encoder
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randperm(1400, generator=generator)[:BATCH].chunk(world_size)[rank]
        x, y = queries(labels[chosen]), labels[chosen]
        loss = partial(global_token_contrastive_loss, logit_scale=20.0, symmetric=False, labels=(y, y), mask=x != 0)
        optimizer.zero_grad()
        value = cached_contrastive_step(model, [x, images[chosen]], loss=loss, chunk_size=CHUNK // world_size)
        optimizer.step()
        if rank == 0 and step % 20 == 0:
            print(f"step {step}: loss {value.item():.3f}")
    if rank == 0:
        encoder.eval()
        asked = torch.arange(10)
        with torch.no_grad():
            x = queries(asked)
            scores = maxsim(encoder(x), encoder(images[1400:]), q_mask=x != 0)
        best = labels[1400:][scores.topk(10).indices]
        print(f"right among the ten best of {len(labels) - 1400} pages: {(best == asked[:, None]).float().mean():.3f}")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
