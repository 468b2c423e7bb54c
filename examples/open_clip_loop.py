"""A training loop as users of open_clip write it; what changed is the line that imports the loss.

    python examples/open_clip_loop.py [--epochs 10]
    torchrun --nproc_per_node 2 examples/open_clip_loop.py

The towers stand for `open_clip.create_model_and_transforms`, whose models return the same dictionary; the data are
scans of handwritten digits with captions, of which there are ten: each stands some 13 times in a batch of 128, so that
the loss stays above log 13 = 2.56. Prints the zero-shot accuracy on held-out scans.
"""

import argparse
import math
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from mmcore.losses import ClipLoss  # was: from open_clip import ClipLoss

WORDS = "a photo of the number zero one two three four five six seven eight nine".split()


class TwoTowers(nn.Module):
    """image [B, 64] and text [B, 6] to unit-norm features, as open_clip's CLIP with `output_dict=True`."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, width))
        self.tokens = nn.Embedding(len(WORDS), width)
        self.text = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_text(self, text: Tensor) -> Tensor:
        return F.normalize(self.text(self.tokens(text).mean(1)), dim=-1)

    def encode_image(self, image: Tensor) -> Tensor:
        return F.normalize(self.visual(image), dim=-1)

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        features = {"image_features": self.encode_image(image), "text_features": self.encode_text(text)}
        return features | {"logit_scale": self.logit_scale.exp()}


def pairs() -> tuple[TensorDataset, TensorDataset]:
    """Scans and captions to train on, scans and classes held out."""
    digits: Any = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    return TensorDataset(images[:1400], captions(labels[:1400])), TensorDataset(images[1400:], labels[1400:])


def captions(labels: Tensor) -> Tensor:
    """`a photo of the number seven` as places in WORDS, [B, 6]."""
    return torch.cat([torch.arange(5).expand(len(labels), -1), 5 + labels[:, None]], 1)


def main(epochs: int) -> None:
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world_size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    train, held_out = pairs()
    sampler = DistributedSampler(train, num_replicas=world_size, rank=rank)
    loader = DataLoader(train, batch_size=128 // world_size, sampler=sampler, drop_last=True)

    towers = TwoTowers()
    model: Any = DistributedDataParallel(towers) if world_size > 1 else towers
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world_size)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for i, (images, texts) in enumerate(loader):
            optimizer.zero_grad()
            losses = loss(**model(images, texts), output_dict=True)
            total_loss: Any = sum(losses.values())
            total_loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                towers.logit_scale.clamp_(0, math.log(100))
            if rank == 0 and i == 0:
                print(f"epoch {epoch}: loss {total_loss.item():.3f}")
    if rank == 0:
        with torch.no_grad():
            images, labels = held_out.tensors
            classes = towers.encode_text(captions(torch.arange(10)))
            found = (towers.encode_image(images) @ classes.T).argmax(1)
        print(f"zero-shot accuracy on {len(labels)} held-out scans: {(found == labels).float().mean():.3f}")
    if world_size > 1:
        dist.barrier()  # a rank that leaves while another works may abort at its exit
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
