"""A training step of CLIP ViT-B/32, from pixels and tokens to stepped and averaged weights, beside transformers' and
open_clip's models with torch's AdamW and an average of the weights: the same weights, batch and loss. Ours computes of
a caption what comes before its end token, on which nothing else depends; they compute the padding too."""

import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig as TransformersConfig
from transformers import CLIPModel

from bench.case import Case, time_case
from bench.harness import DTYPE
from bench.lists import sizes
from bench.measure import gemm_flops_per_s, machine_rates, paired_medians
from bench.peers import load, missing
from mmcore.losses import global_contrastive_loss
from mmcore.optim import AdamWEMA
from mmcore.parts.vit import VisionConfig
from mmcore.systems.clip import names as clip_names
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextConfig, caption_lengths
from mmcore.systems.clip.shapes import CLIP_CONFIGS

LR, DECAY, WEIGHT_DECAY = 1e-4, 0.9999, 0.1
# AdamW's and the average's bytes a parameter in float32
UPDATE_BYTES = 36
Step = Callable[[Tensor, Tensor, list[int]], Tensor]


def clip(config: CLIPConfig = CLIP_CONFIGS["ViT-B-32"]) -> CLIP:
    """The weights that every contender starts from."""
    torch.manual_seed(0)
    return CLIP(config)


def batch(size: int, config: CLIPConfig, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Images, and captions of COCO's lengths, padded to the context as open_clip's tokenizer does; the lengths, which
    a loader knows before a GPU has the captions."""
    generator = torch.Generator().manual_seed(1)
    side, text = config.vision.image_size, config.text
    images = torch.randn(size, 3, side, side, generator=generator)
    end = text.vocab_size - 1
    tokens = torch.randint(1, end - 1, (size, text.context_length), generator=generator)
    ends = torch.randint(text.context_length // 8, text.context_length // 4, (size, 1), generator=generator)
    place = torch.arange(text.context_length)
    tokens = tokens.masked_fill(place == ends, end).masked_fill(place > ends, 0)
    return images.to(device), tokens.to(device), caption_lengths(tokens, text.eos_token_id)


def step_flops(config: CLIPConfig, lengths: list[int]) -> float:
    """Of the products that a step needs, forward and both gradients: those of no token behind an end."""

    def tower(part: VisionConfig | TextConfig, lengths: list[int]) -> float:
        weights = 4 * part.width**2 + 2 * part.width * part.mlp_dim
        layer = sum(length * weights + 2 * length**2 * part.width for length in lengths)
        return part.num_layers * layer + len(lengths) * part.width * config.embed_dim

    vision, patches, size = config.vision, config.vision.num_patches, len(lengths)
    pixels = size * 3 * vision.patch_size**2 * vision.width * patches
    return 3 * 2 * (tower(vision, [patches + 1] * size) + tower(config.text, lengths) + pixels)


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, as CLIP is trained; float32 on a CPU unless `--dtype` says else."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=torch.bfloat16 == DTYPE)


def ours(start: CLIP, device: torch.device, *, pads: bool = False) -> Step:
    """`pads` computes every caption to the end of the context, as the others do."""
    model = start.to(device)
    optimizer = AdamWEMA(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, ema=DECAY)

    def step(images: Tensor, tokens: Tensor, lengths: list[int]) -> Tensor:
        optimizer.zero_grad()
        with _autocast(device):
            whole = [tokens.shape[1]] * len(tokens)
            image, text, scale = model(images, tokens, whole if pads else lengths)
            loss = global_contrastive_loss(image, text, scale)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def eager_step(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], device: torch.device, *, fused: bool
) -> Step:
    """A loop as people write it: torch's AdamW, and the average after it; `fused` takes the fastest that torch has of
    both, else AdamW is torch's default and the average a loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True if fused else None)
    weights: list[Tensor] = list(model.parameters())
    averages = [p.detach().clone() for p in weights]

    def step(images: Tensor, tokens: Tensor, _: list[int]) -> Tensor:
        optimizer.zero_grad()
        with _autocast(device):
            loss = loss_of(images, tokens)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            if fused:
                torch._foreach_lerp_(averages, weights, 1 - DECAY)
            else:
                for average, weight in zip(averages, weights, strict=True):
                    average.mul_(DECAY).add_(weight, alpha=1 - DECAY)
        return loss.detach()

    return step


def transformers_clip(start: CLIP, device: torch.device, *, fused: bool, compiled: bool = False) -> Step:
    """CLIPModel, and OpenAI's loss on its features, which have unit norm."""
    model = CLIPModel(TransformersConfig(**clip_names.HF_SETTINGS.write("clip_step", start.config)))
    model.load_state_dict(clip_names.HF.write(start.state_dict()))
    model.to(device).train()  # pyright: ignore[reportArgumentType]
    call: Any = torch.compile(model) if compiled else model

    def loss_of(images: Tensor, tokens: Tensor) -> Tensor:
        out = call(input_ids=tokens, pixel_values=images)
        logits = model.logit_scale.exp() * out.image_embeds @ out.text_embeds.T
        target = torch.arange(len(images), device=images.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return eager_step(model, loss_of, device, fused=fused)


def open_clip(start: CLIP, device: torch.device) -> Step:
    """Its CLIP and its ClipLoss."""
    library = load("open_clip")
    settings = clip_names.OPEN_CLIP_SETTINGS.write("clip_step", start.config)
    model = library.CLIP(**settings["model_cfg"])
    # beside them its causal mask, a buffer
    model.load_state_dict(clip_names.OPEN_CLIP.write(start.state_dict()), strict=False)
    model.to(device).train()
    loss = library.ClipLoss()
    return eager_step(model, lambda images, tokens: loss(*model(images, tokens)), device, fused=True)


CONTENDERS: Mapping[str, Callable[[CLIP, torch.device], Step]] = {
    "mmcore": ours,
    "mmcore, captions padded": functools.partial(ours, pads=True),
    "transformers, AdamW, EMA by a loop": lambda start, device: transformers_clip(start, device, fused=False),
    "transformers, AdamW(fused), EMA by foreach": lambda start, device: transformers_clip(start, device, fused=True),
    "transformers compiled, AdamW(fused), EMA by foreach": lambda start, device: transformers_clip(
        start, device, fused=True, compiled=True
    ),
    "open_clip, AdamW(fused), EMA by foreach": open_clip,
}


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# a rank's batch on a GPU; seconds a step on two cores
SIZE = 256 if DEVICE.type == "cuda" else 4
CONFIG = CLIP_CONFIGS["ViT-B-32"]


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """The last contender's weights, moments and averages are gone before the next one's are made."""
    yield
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def skip_reason(contender: str) -> str | None:
    peer = contender.split()[0].rstrip(",")
    if peer in ("open_clip", "transformers") and (reason := missing(peer)):
        return f"{peer} {reason}"
    if "compiled" in contender and DEVICE.type == "cpu":
        return "compiled on GPUs only: two towers take minutes of two cores"
    return None


def step(contender: str, config: CLIPConfig = CONFIG, size: int = SIZE) -> Callable[[], Tensor]:
    return functools.partial(CONTENDERS[contender](clip(config), DEVICE), *batch(size, config, DEVICE))


@pytest.mark.parametrize("contender", CONTENDERS)
def test_clip_step(benchmark: Any, device: torch.device, contender: str) -> None:
    if reason := skip_reason(contender):
        pytest.skip(reason)
    lengths = batch(SIZE, CONFIG, torch.device("cpu"))[2]
    products = step_flops(CONFIG, lengths) / gemm_flops_per_s(2048, 768, 3072, DTYPE, device)
    params = sum(sizes("ViT-B-32"))
    case = Case(
        group=f"clip{'[amp_bf16]' if torch.bfloat16 == DTYPE else ''} ViT-B-32-B{SIZE}",
        contender=contender,
        loss=step(contender),
        wrt=(),
        mode="step",
        floor_s=products + UPDATE_BYTES * params / machine_rates(device)[0],
    )
    time_case(benchmark, device, case)


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name != "mmcore"])
def test_all_compute_the_same_losses(contender: str) -> None:
    """At the first step, and at the third: so of the same gradients, moments and steps; in a small CLIP."""
    if reason := skip_reason(contender):
        pytest.skip(reason)
    runs = [step(name, CLIP_CONFIGS["tiny"], 6) for name in ("mmcore", contender)]
    for _ in range(3):
        ours, theirs = (run().item() for run in runs)
        assert ours == pytest.approx(theirs, rel=2e-2 if torch.bfloat16 == DTYPE else 1e-4)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a claim about CPUs")
def test_a_step_is_ahead_of_the_best_eager_one_on_a_cpu() -> None:
    runs = {name: step(name) for name in ("mmcore", "transformers, AdamW(fused), EMA by foreach")}
    first = {name: run().item() for name, run in runs.items()}
    assert max(first.values()) == pytest.approx(min(first.values()), rel=2e-2 if torch.bfloat16 == DTYPE else 1e-4), (
        first
    )
    medians = paired_medians(runs, 3, DEVICE)
    ratio = min(s for name, s in medians.items() if name != "mmcore") / medians["mmcore"]
    print(f"CLIP ViT-B/32 step, {SIZE} pairs: {medians}: {ratio:.2f}x")
    assert ratio >= 1.2
