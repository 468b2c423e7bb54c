"""A training step of SigLIP, and of SigLIP 2 on images of unlike shapes, beside transformers' models: the same weights,
the same batch, torch's fused AdamW and an average by foreach."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

from bench.case import Case, time_case
from bench.measure import machine_rates
from bench.test_clip_step import DEVICE, UPDATE_BYTES
from bench.test_two_towers import CONTENDERS, SIZE, Pair, step
from mmcore.data.transforms.naflex import Patches
from mmcore.losses import global_sigmoid_loss
from mmcore.systems.siglip import weights as siglip_weights
from mmcore.systems.siglip.model import SigLIP
from mmcore.systems.siglip.shapes import siglip_config
from mmcore.systems.siglip2 import weights as siglip2_weights
from mmcore.systems.siglip2.model import SigLIP2
from mmcore.systems.siglip2.shapes import siglip2_config

GRIDS = ((16, 16), (8, 32), (22, 11), (32, 8))
"""Rows and columns of patches, of images in turns: at most 256."""


def _sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * text @ image.T + bias
    signs = 2 * torch.eye(len(image), device=image.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def siglip(*, is_small: bool, size: int) -> Pair:
    torch.manual_seed(0)
    config = siglip_config("tiny" if is_small else "B-16-224")
    ours, side = SigLIP(config), config.vision.image_size
    theirs: Any = SiglipModel(SiglipConfig(**siglip_weights.SETTINGS.write("bench", config))).train()
    theirs.load_state_dict(siglip_weights.LAYOUT.write(ours.state_dict()))
    images = torch.randn(size, 3, side, side).to(DEVICE)
    tokens = torch.randint(1, config.text.vocab_size, (size, config.text.context_length)).to(DEVICE)

    def our_loss() -> Tensor:
        return global_sigmoid_loss(*ours(images, tokens))

    def their_loss() -> Tensor:
        out = theirs(input_ids=tokens, pixel_values=images)
        return _sigmoid(out.image_embeds, out.text_embeds, theirs.logit_scale.exp(), theirs.logit_bias)

    return Pair(ours.to(DEVICE), our_loss, theirs.to(DEVICE), their_loss)


def siglip2(*, is_small: bool, size: int) -> Pair:
    """Without decoder and distillation, which transformers does not have; of the first SigLIP's vocabulary, since an
    eighth of Gemma's embedding says as much of a step."""
    torch.manual_seed(0)
    config = replace(siglip2_config("tiny" if is_small else "B-16"), decoder_layers=0)
    if not is_small:
        config = replace(config, text=replace(config.text, vocab_size=32_000))
    ours, patch = SigLIP2(config), config.vision.patch_size
    settings: dict[str, Any] = siglip2_weights.SETTINGS.write("bench", config)
    theirs: Any = Siglip2Model(Siglip2Config(**settings)).train()
    theirs.load_state_dict(siglip2_weights.LAYOUT.write(ours.state_dict()))
    theirs.set_attn_implementation("sdpa")
    grids = [GRIDS[i % len(GRIDS)] for i in range(size)]
    if is_small:
        grids = [(rows // 4, columns // 4) for rows, columns in grids]
    counts = [rows * columns for rows, columns in grids]
    rows = torch.randn(sum(counts), 3, patch, patch)
    tokens = torch.randint(1, config.text.vocab_size, (size, config.text.context_length)).to(DEVICE)
    pixels = torch.zeros(size, max(counts), 3 * patch**2)
    for i, part in enumerate(rows.permute(0, 2, 3, 1).flatten(1).split(counts)):
        pixels[i, : len(part)] = part
    seen = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    given = {"pixel_values": pixels, "pixel_attention_mask": seen.long(), "spatial_shapes": torch.tensor(grids)}
    given, images = {n: x.to(DEVICE) for n, x in given.items()}, Patches(rows.to(DEVICE), grids)

    def our_loss() -> Tensor:
        return global_sigmoid_loss(*ours(images, tokens))

    def their_loss() -> Tensor:
        out = theirs(input_ids=tokens, **given)
        return _sigmoid(out.image_embeds, out.text_embeds, theirs.logit_scale.exp(), theirs.logit_bias)

    return Pair(ours.to(DEVICE), our_loss, theirs.to(DEVICE), their_loss)


SYSTEMS = {"siglip": siglip, "siglip2": siglip2}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_siglip_step(benchmark: Any, device: torch.device, system: str, contender: str) -> None:
    made = SYSTEMS[system](is_small=False, size=SIZE)
    floor = UPDATE_BYTES * sum(p.numel() for p in made.ours.parameters()) / machine_rates(device)[0]
    time_case(benchmark, device, Case(f"{system} B-16-B{SIZE}", contender, step(made, contender), (), "step", floor))


@pytest.mark.parametrize("system", SYSTEMS)
def test_both_compute_the_same_losses(system: str) -> None:
    runs = [step(SYSTEMS[system](is_small=True, size=6), contender) for contender in CONTENDERS]
    for _ in range(3):
        ours, theirs = (run().item() for run in runs)
        assert ours == pytest.approx(theirs, rel=2e-2 if DEVICE.type == "cuda" else 1e-3)
