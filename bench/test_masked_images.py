"""A training step of MAE and of BEiT beside transformers' eager models of the same weights, images and masks, with
AdamW as torch fuses it."""

import gc
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import BeitForMaskedImageModeling, ViTMAEForPreTraining

from bench.case import Case, time_case
from bench.measure import machine_rates
from mmcore.optim import AdamWEMA
from mmcore.parts.pixels import masked_error
from mmcore.parts.vit import VisionConfig
from mmcore.systems.mae.model import MAE, MAEConfig
from mmcore.systems.mae.shapes import MAE_CONFIGS
from mmcore.systems.mae.weights import save_mae
from mmcore.systems.mim import shapes
from mmcore.systems.mim.model import Mim, MimConfig
from mmcore.systems.mim.targets import LOSSES
from mmcore.systems.mim.weights import save_mim

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LR, WEIGHT_DECAY = 1e-4, 0.05
# four layers of ViT-B, and of the decoder two, on a CPU: half a second a step
SIZE, LAYERS = (64, 12) if DEVICE.type == "cuda" else (2, 4)
# AdamW's bytes a parameter in float32
UPDATE_BYTES = 28
CONTENDERS = ("mmcore", "transformers, AdamW(fused)")


class Batch(NamedTuple):
    """Images, and which patches are masked."""

    images: Tensor
    masked: Tensor


def mae_config(*, is_tiny: bool) -> MAEConfig:
    if is_tiny:
        return MAE_CONFIGS["tiny"]
    found = MAE_CONFIGS["ViT-B-16"]
    return replace(found, vision=replace(found.vision, num_layers=LAYERS), decoder_layers=LAYERS // 2)


def beit_config(*, is_tiny: bool) -> MimConfig:
    found = shapes.BEIT["tiny" if is_tiny else "ViT-B-16"]
    layers = found.vision.num_layers if is_tiny else LAYERS
    return replace(found, vision=replace(found.vision, num_layers=layers, drop_path=0.0))


def batch(vision: VisionConfig, size: int, share: float) -> Batch:
    """As many patches of each image are masked."""
    generator = torch.Generator().manual_seed(1)
    side, patches = vision.image_size, vision.num_patches
    images = torch.randn(size, 3, side, side, generator=generator)
    places = torch.rand(size, patches, generator=generator).argsort(1)[:, : int(patches * share)]
    masked = torch.zeros(size, patches, dtype=torch.bool).scatter(1, places, True)
    return Batch(images.to(DEVICE), masked.to(DEVICE))


def stepping(model: nn.Module, optimizer: Any, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    model.train()
    return step


def contender(system: str, name: str, *, is_tiny: bool = False, size: int = SIZE) -> tuple[Callable[[], Tensor], int]:
    """A step, and how many weights it moves."""
    torch.manual_seed(0)
    config: Any = (mae_config if system == "MAE" else beit_config)(is_tiny=is_tiny)
    data = batch(config.vision, size, 0.75 if system == "MAE" else 0.4)
    model: Any = (MAE if system == "MAE" else Mim)(config).to(DEVICE)
    count, places = sum(p.numel() for p in model.parameters()), data.masked.flatten().nonzero()[:, 0]
    tokens = places % (8 if is_tiny else config.outputs if system == "BEiT" else 8)
    if name == "mmcore":
        optimizer: Any = AdamWEMA(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        kept = (~data.masked).nonzero()[:, 1].view(size, -1)

        def ours() -> Tensor:
            if system == "MAE":
                predicted, target = model(data.images, kept)
                total, number = masked_error(predicted, target, kept)
                return total / number
            return LOSSES["cross-entropy"](model(data.images, data.masked, places)[0][0], tokens).mean()

        return stepping(model, optimizer, ours), count
    theirs = transformers_model(system, model)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    # theirs keeps the patches of the least noise
    given = {"noise": data.masked.float()} if system == "MAE" else {"bool_masked_pos": data.masked, "labels": tokens}
    return stepping(theirs, optimizer, lambda: theirs(data.images, **given).loss), count


def transformers_model(system: str, model: Any) -> Any:
    """Its eager model of the same weights."""
    kind: Any = ViTMAEForPreTraining if system == "MAE" else BeitForMaskedImageModeling
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if system == "MAE":
            save_mae(model, folder)
        else:
            save_mim(model, folder, predicts="tokens")
        return kind.from_pretrained(folder, attn_implementation="eager").to(DEVICE)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("system", ["MAE", "BEiT"])
def test_step(benchmark: Any, system: str, name: str) -> None:
    step, count = contender(system, name)
    floor_s = count * UPDATE_BYTES / machine_rates(DEVICE)[0]
    group = f"{system} step, {SIZE} images of 224"
    time_case(benchmark, DEVICE, Case(group, name, step, (), "step", floor_s))
    gc.collect()


@pytest.mark.parametrize("system", ["MAE", "BEiT"])
def test_steps_agree(system: str) -> None:
    losses = []
    for name in CONTENDERS:
        step, _ = contender(system, name, is_tiny=True, size=3)
        losses.append([step().item() for _ in range(2)])
    # Adam's first step goes by signs, also of gradients that are rounding alone
    for one, other, bound in zip(*losses, (1e-5, 2e-3), strict=True):
        assert one == pytest.approx(other, rel=bound)
