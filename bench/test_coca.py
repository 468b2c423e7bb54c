"""A training step of CoCa ViT-B/32, from pixels and tokens to stepped and averaged weights, beside open_clip's model
and loss with torch's fused AdamW and an average by foreach: the same weights and batch. Ours computes captions to the
end of the longest, on which nothing else depends; open_clip computes the padding too."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.case import Case, time_case
from bench.harness import DTYPE
from bench.measure import gemm_flops_per_s, machine_rates, paired_medians
from bench.peers import load
from bench.test_clip_step import DECAY, DEVICE, LR, UPDATE_BYTES, WEIGHT_DECAY, batch, eager_step, skip_reason
from bench.test_clip_step import freed as freed
from mmcore.optim import AdamWEMA
from mmcore.recipe import Step
from mmcore.systems.clip.recipe import ClipBatch
from mmcore.systems.coca.model import CoCa, CoCaConfig
from mmcore.systems.coca.recipe import Coca
from mmcore.systems.coca.shapes import COCA_CONFIGS
from mmcore.systems.coca.weights import SETTINGS, layout

NAME = "ViT-B-32"
CONFIG = COCA_CONFIGS[NAME]
# a rank's batch on a GPU; a second or two a step on two cores
SIZE = 256 if DEVICE.type == "cuda" else 2


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=torch.bfloat16 == DTYPE)


def ours(start: CoCa, size: int, *, pads: bool = False) -> Callable[[], Tensor]:
    """`pads` computes every caption to the end of the context, as open_clip does."""
    model, recipe = start.to(DEVICE).train(), Coca()
    optimizer = AdamWEMA(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, ema=DECAY)
    images, tokens, lengths = batch(size, start.config, DEVICE)
    given = ClipBatch(images, tokens, [tokens.shape[1]] * size if pads else lengths)

    def run() -> Tensor:
        optimizer.zero_grad()
        with autocast():
            loss = recipe.objective(recipe.features(model, given), [given], Step(0, 1, 0))["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def open_clip(start: CoCa, size: int) -> Callable[[], Tensor]:
    """Its CoCa and its CoCaLoss."""
    library: Any = load("open_clip")
    settings = SETTINGS.write("bench", start.config)["model_cfg"]
    model = library.CoCa(**{name: x for name, x in settings.items() if name != "custom_text"})
    model.load_state_dict(layout(start.config).write(start.state_dict()))
    model.to(DEVICE).train()
    loss = library.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)

    def loss_of(images: Tensor, tokens: Tensor) -> Tensor:
        contrast, caption = loss(**model(images, tokens))
        return contrast + caption

    step = eager_step(model, loss_of, DEVICE, fused=True)
    return functools.partial(step, *batch(size, start.config, DEVICE))


CONTENDERS: dict[str, Callable[[CoCa, int], Callable[[], Tensor]]] = {
    "mmcore": ours,
    "mmcore, captions padded": functools.partial(ours, pads=True),
    "open_clip, AdamW(fused), EMA by foreach": open_clip,
}


def step(contender: str, config: CoCaConfig = CONFIG, size: int = SIZE) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    return CONTENDERS[contender](CoCa(config), size)


def step_flops(config: CoCaConfig, size: int, length: int) -> float:
    """Of the products of a step, forward and both gradients, of captions of one length."""
    vision, text, queries = config.vision, config.text, config.num_queries
    image, width = vision.num_patches + 1, text.width
    tower = vision.num_layers * (image * (4 * vision.width**2 + 2 * vision.width * vision.mlp_dim))
    pooler = queries * 2 * width**2 + image * 2 * vision.width * width
    block = 4 * width**2 + 2 * width * text.mlp_dim
    words = (length + 1) * text.num_layers * block
    # self-attention, cross-attention without its keys, and two feed-forwards of four times the width
    decoder = config.num_layers * width**2 * (length * (4 + 2 + 8 + 8) + queries * 2)
    head = length * width * text.vocab_size
    pixels = vision.num_patches * 3 * vision.patch_size**2 * vision.width
    return 3 * 2 * size * (tower + pooler + words + decoder + head + pixels)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_coca_step(benchmark: Any, device: torch.device, contender: str) -> None:
    if reason := skip_reason(contender):
        pytest.skip(reason)
    longest = max(batch(SIZE, CONFIG, torch.device("cpu"))[2])
    products = step_flops(CONFIG, SIZE, longest) / gemm_flops_per_s(2048, 768, 3072, DTYPE, device)
    with torch.device("meta"):
        params = sum(p.numel() for p in CoCa(CONFIG).parameters())
    floor = products + UPDATE_BYTES * params / machine_rates(device)[0]
    group = f"coca{'[amp_bf16]' if torch.bfloat16 == DTYPE else ''} {NAME}-B{SIZE}"
    time_case(benchmark, device, Case(group, contender, step(contender), (), "step", floor))


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name != "mmcore"])
def test_all_compute_the_same_losses(contender: str) -> None:
    """At the first step, and at the third: so of the same gradients, moments and steps; in a small CoCa."""
    if reason := skip_reason(contender):
        pytest.skip(reason)
    runs = [step(name, COCA_CONFIGS["tiny"], 6) for name in ("mmcore", contender)]
    for _ in range(3):
        found, theirs = (run().item() for run in runs)
        assert found == pytest.approx(theirs, rel=2e-2 if torch.bfloat16 == DTYPE else 1e-4)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a claim about CPUs")
def test_a_step_is_ahead_of_open_clips_on_a_cpu() -> None:
    theirs = "open_clip, AdamW(fused), EMA by foreach"
    if reason := skip_reason(theirs):
        pytest.skip(reason)
    medians = paired_medians({name: step(name) for name in ("mmcore", theirs)}, 3, DEVICE)
    ratio = medians[theirs] / medians["mmcore"]
    print(f"CoCa {NAME} step, {SIZE} pairs: {medians}: {ratio:.2f}x")
    assert ratio >= 1.3
