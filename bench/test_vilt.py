"""A training step of ViLT, hidden words and matching at the published shapes, beside transformers' eager
ViltForMaskedLM with a matching head, at the same weights and on the same pairs, with AdamW as torch fuses it."""

import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViltForMaskedLM

from bench.case import Case, time_case
from bench.measure import machine_rates, paired_medians
from mmcore.data.transforms.naflex import Grid, Patches
from mmcore.labels import IGNORED
from mmcore.ops import CALLS_ONEDNN
from mmcore.optim import AdamWEMA
from mmcore.systems.vilt.model import ViLT
from mmcore.systems.vilt.shapes import VILT_CONFIGS, ViltConfig
from mmcore.systems.vilt.weights import save_vilt

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LR, WEIGHT_DECAY = 1e-4, 0.01
# a rank's pairs and the published layers on a GPU; two pairs and four layers on a CPU, a second or two a step
SIZE, LAYERS = (64, 12) if DEVICE.type == "cuda" else (2, 4)
# AdamW's bytes a parameter in float32
UPDATE_BYTES = 28
CONTENDERS = ("mmcore", "transformers eager, AdamW(fused)")
# of COCO's pictures, most of which are 640 x 480, every other one the other way around
GRIDS: tuple[Grid, ...] = ((12, 16), (16, 12))


def shape(*, is_tiny: bool) -> ViltConfig:
    found = VILT_CONFIGS["tiny" if is_tiny else "B-32"]
    layers = found.vision.num_layers if is_tiny else LAYERS
    return replace(found, vision=replace(found.vision, num_layers=layers))


class Pairs:
    """Pairs of COCO's lengths, as both models read them."""

    def __init__(self, config: ViltConfig, size: int) -> None:
        generator, patch = torch.Generator().manual_seed(1), config.vision.patch_size
        grids = [GRIDS[i % 2] for i in range(size)]
        side = max(max(grid) for grid in grids)
        pixels = torch.zeros(size, 3, side * patch, side * patch)
        mask = torch.zeros(size, side * patch, side * patch, dtype=torch.int64)
        parts = []
        for i, (h, w) in enumerate(grids):
            image = torch.randn(3, h * patch, w * patch, generator=generator)
            pixels[i, :, : h * patch, : w * patch], mask[i, : h * patch, : w * patch] = image, 1
            cells = image.unflatten(2, (w, patch)).unflatten(1, (h, patch))
            parts.append(Patches(cells.permute(1, 3, 0, 2, 4).flatten(0, 1), [(h, w)]))
        length = config.context_length
        self.lengths = torch.randint(10, 20, (size,), generator=generator).tolist()
        self.lengths[0] = length
        tokens = torch.randint(5, config.vocab_size, (size, length), generator=generator)
        seen = torch.arange(length) < torch.tensor(self.lengths)[:, None]
        labels = tokens.masked_fill((torch.rand(tokens.shape, generator=generator) > 0.15) | ~seen, IGNORED)
        labels[:, 1] = tokens[:, 1]
        self.tokens, self.labels = tokens.masked_fill(~seen, 0).to(DEVICE), labels.to(DEVICE)
        self.hidden = (self.labels.flatten() != IGNORED).nonzero()[:, 0]
        self.wanted = self.labels.flatten()[self.hidden]
        self.masked = torch.where(self.labels == IGNORED, self.tokens, 4)
        self.index = [i if i % 2 else (i + 1) % size for i in range(size)]  # every other text about another's image
        self.is_match = (torch.tensor(self.index) == torch.arange(size)).long().to(DEVICE)
        self.images = Patches.joined(parts).to(DEVICE)
        self.pixels = {"pixel_values": pixels.to(DEVICE), "pixel_mask": mask.to(DEVICE)}
        self.seen = seen.long().to(DEVICE)


class Theirs(nn.Module):
    """transformers' model and the original's matching head: a pass for each objective."""

    def __init__(self, ours: ViLT) -> None:
        super().__init__()
        with tempfile.TemporaryDirectory() as temporary:
            save_vilt(ours, Path(temporary) / "model")
            self.model: Any = ViltForMaskedLM.from_pretrained(Path(temporary) / "model", attn_implementation="eager")
        assert ours.itm is not None
        self.itm = nn.Linear(ours.itm.in_features, 2)
        self.itm.load_state_dict(ours.itm.state_dict())

    def forward(self, pairs: Pairs) -> Tensor:
        options = {"attention_mask": pairs.seen}
        words = self.model(pairs.masked, **pairs.pixels, **options, labels=pairs.labels).loss
        pixels = {name: x[pairs.index] for name, x in pairs.pixels.items()}
        pooled = self.model.vilt(pairs.tokens, **pixels, **options).pooler_output
        return words + F.cross_entropy(self.itm(pooled).float(), pairs.is_match)


def our_loss(model: ViLT, pairs: Pairs) -> Tensor:
    """The same two, in passes that share what is made of images; the transport is computed and not used."""
    texts = pairs.tokens, pairs.lengths, pairs.masked, pairs.hidden, pairs.wanted, pairs.index
    learned = model("pretrain", pairs.images, None, *texts)
    return learned.words / len(pairs.wanted) + F.cross_entropy(learned.match.float(), pairs.is_match)


def contender(name: str, *, is_tiny: bool = False, size: int = SIZE) -> tuple[Callable[[], Tensor], int]:
    """A step, and how many weights it moves."""
    torch.manual_seed(0)
    config = shape(is_tiny=is_tiny)
    model, pairs = ViLT(config), Pairs(config, size)
    count = sum(p.numel() for p in model.parameters())
    if name == "mmcore":
        model = model.to(DEVICE).train()
        optimizer: Any = AdamWEMA(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        loss_of = lambda: our_loss(model, pairs)  # noqa: E731
    else:
        theirs = Theirs(model).to(DEVICE).train()
        del model
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
        loss_of = lambda: theirs(pairs)  # noqa: E731

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, count


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """The last contender's weights are gone before the next one's are made."""
    yield
    gc.collect()


@pytest.mark.parametrize("name", CONTENDERS)
def test_vilt_step(benchmark: Any, name: str) -> None:
    step, count = contender(name)
    floor_s = count * UPDATE_BYTES / machine_rates(DEVICE)[0]
    group = f"ViLT step, {SIZE} pairs of 384 x 512, {LAYERS} layers"
    time_case(benchmark, DEVICE, Case(group, name, step, (), "step", floor_s))


def test_steps_agree() -> None:
    losses = []
    for name in CONTENDERS:
        step, _ = contender(name, is_tiny=True, size=3)
        losses.append([step().item() for _ in range(2)])
    # Adam's first step goes by signs, also of gradients that are rounding alone
    for one, other, bound in zip(*losses, (1e-5, 2e-3), strict=True):
        assert one == pytest.approx(other, rel=bound)


def test_a_step_is_ahead_of_the_eager_one() -> None:
    medians = paired_medians({name: contender(name)[0] for name in CONTENDERS}, 3, DEVICE)
    ratio = medians[CONTENDERS[1]] / medians[CONTENDERS[0]]
    print(f"ViLT step, {SIZE} pairs, {LAYERS} layers: {medians}: {ratio:.2f}x")
    assert ratio >= (1.3 if DEVICE.type == "cuda" or CALLS_ONEDNN else 1.1)
