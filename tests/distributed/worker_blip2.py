"""BLIP-2's first stage on these ranks: rows from others, hard negatives, a whole step's losses and gradients."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcore.data.text.wordpiece import Texts
from mmcore.losses import fetch_rows, hard_negatives, pair_labels
from mmcore.parts.vit import VisionConfig
from mmcore.systems.blip2.model import BLIP2, BLIP2Config
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.blip2.steps import Pair, stage1_losses
from tests.distributed.launch import serve

SIZE, LENGTH, VOCAB = 8, 6, 50
# pairs 1 and 5 show one image, 2 and 6 have one caption, 5 and 6 join the two
IMAGE_IDS = torch.tensor([0, 1, 2, 3, 4, 1, 6, 7])
TEXT_IDS = torch.tensor([10, 11, 12, 13, 14, 15, 12, 17])


def model() -> BLIP2:
    torch.manual_seed(0)
    vision = VisionConfig(image_size=16, patch_size=8, width=24, num_layers=1, num_heads=2, mlp_dim=48)
    qformer = QFormerConfig(
        num_queries=3, width=16, num_layers=2, num_heads=2, mlp_dim=32, image_width=24, vocab_size=VOCAB, max_text=10,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    # so small a temperature leaves nothing to chance
    config = BLIP2Config(vision, qformer, embed_dim=8, decoder_token_id=VOCAB - 1, init_temperature=1e-3)
    found = BLIP2(config).double().train()
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.3 * torch.randn_like(p)) if p.numel() > 1 else None
    return found


def batch() -> tuple[Tensor, Texts]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SIZE, 3, 16, 16, generator=generator, dtype=torch.float64)
    num_text = torch.randint(2, LENGTH + 1, (SIZE,), generator=generator)
    tokens = torch.randint(1, VOCAB - 1, (SIZE, LENGTH), generator=generator)
    return images, Texts(tokens.masked_fill(torch.arange(LENGTH) >= num_text[:, None], 0), num_text)


def step(rows: slice) -> dict[str, Any]:
    """Losses, and the mean over ranks of the gradients of all of them."""
    blip2, (images, texts) = model(), batch()
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    mine = Texts(*(x[rows] for x in texts))
    losses = stage1_losses(blip2, Pair(images[rows], mine, IMAGE_IDS[rows], TEXT_IDS[rows]), generator)
    losses["loss"].backward()
    grads = {}
    for name, p in blip2.named_parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            grads[name] = (p.grad / dist.get_world_size()).tolist()
    return {"losses": {name: x.item() for name, x in losses.items()}, "grads": grads}


def negatives(rows: slice, draws: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    tokens = F.normalize(torch.randn(SIZE, 3, 8, generator=generator), dim=-1)[rows]
    b = F.normalize(torch.randn(SIZE, 8, generator=generator), dim=-1)[rows]
    mine = torch.Generator().manual_seed(dist.get_rank())
    ids = {"image_ids": IMAGE_IDS[rows], "text_ids": TEXT_IDS[rows], "generator": mine}
    drawn = [hard_negatives(tokens, b, 5.0, **ids) for _ in range(draws)]
    return {name: [getattr(x, name).tolist() for x in drawn] for name in ("images", "texts")}


def main(folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = SIZE // world_size
    rows = slice(rank * share, (rank + 1) * share)
    table = torch.arange(5 * SIZE).view(SIZE, 5).to(torch.bfloat16)
    wanted = torch.tensor([7, 0, 3, 3, 6, 1])[rank:]
    # ranks of different sizes, the first without any
    uneven = [0, *([1] * (world_size - 2)), SIZE - world_size + 2] if world_size > 1 else [SIZE]
    first = sum(uneven[:rank])
    learned = table[rows].float().requires_grad_()
    shares = torch.arange(1.0, 7.0)[rank:, None]
    torch.cat([fetch_rows(learned, wanted) * shares, fetch_rows(learned, wanted[:0])]).sum().backward()
    assert learned.grad is not None
    return {
        "gradient": learned.grad[:, 0].tolist(),
        "fetched": fetch_rows(table[rows], wanted).tolist(),
        "uneven": fetch_rows(table[first : first + uneven[rank]], wanted).tolist(),
        "nothing": list(fetch_rows(table[rows], wanted[:0]).shape),
        "wanted": table[wanted].tolist(),
        "labels": pair_labels(IMAGE_IDS[rows], TEXT_IDS[rows]).tolist(),
        "all the same": hard_negatives(
            torch.ones(share, 1, 2), torch.ones(share, 2), 1.0, image_ids=torch.zeros(share, dtype=torch.int64),
            text_ids=torch.arange(share), generator=torch.Generator(),
        ).images.tolist(),
        "negatives": negatives(rows, 400),
        "step": step(rows),
    }  # fmt: skip


if __name__ == "__main__":
    serve(main)
