"""A training step of DINO beside its eager original at the same weights and on the same views: transformers' ViT,
torch's weight normalisation and fused AdamW, the published loss, and the teacher's average by foreach."""

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig as TransformersConfig
from transformers import ViTModel

from bench.case import Case, time_case
from bench.measure import machine_rates
from mmcore.losses import view_distillation_loss
from mmcore.nn import MomentumEncoder
from mmcore.optim import AdamWEMA
from mmcore.parts.heads import Centre
from mmcore.parts.vit_names import VIT_TOWER
from mmcore.systems.dino.model import DINOConfig, DINOModel
from mmcore.systems.dino.recipe import Dino
from mmcore.weights.layout import Layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LR, WEIGHT_DECAY, MOMENTUM, STUDENT, TEACHER = 1e-4, 0.04, 0.996, 0.1, 0.04
# a fraction of the pixels and prototypes on a CPU: a second a step
SIZE, SIDE, SMALL, PROTOTYPES = (64, 224, 96, 65_536) if DEVICE.type == "cuda" else (2, 112, 48, 16_384)
NUM_SMALL = 2
# AdamW's bytes a parameter in float32, and the teacher's
UPDATE_BYTES = 28 + 12
CONTENDERS = ("mmcore", "transformers, AdamW(fused), EMA by foreach")


def shape(*, is_tiny: bool) -> DINOConfig:
    if is_tiny:
        return Dino.shapes["tiny"]
    found: DINOConfig = Dino.shapes["ViT-S-16"]
    vision = replace(found.vision, image_size=SIDE, drop_path=0.0)
    return replace(found, vision=vision, num_prototypes=PROTOTYPES)


def views(config: DINOConfig, size: int) -> tuple[Tensor, Tensor]:
    side = config.vision.image_size
    small = side // 2 if side < SIDE else SMALL
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, size, 3, side, side), (NUM_SMALL, size, 3, small, small))
    large, little = (torch.randn(x, generator=generator).to(DEVICE) for x in shapes)
    return large, little


def ours(config: DINOConfig, size: int) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model = DINOModel(config).to(DEVICE).train()
    teacher, centre = MomentumEncoder(model, MOMENTUM), Centre(config.num_prototypes).to(DEVICE)
    optimizer = AdamWEMA(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    large, small = views(config, size)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
            found, told = model(large, small), teacher(large).large
        loss = view_distillation_loss([*found.large, *found.small], list(told), STUDENT, TEACHER, centre.mean)
        loss.backward()
        optimizer.step()
        teacher.update()
        centre.add(told.flatten(0, 1))
        centre.update()
        return loss.detach()

    return step


class Published(nn.Module):
    """The tower and the head of the published code, from ours."""

    def __init__(self, start: DINOModel) -> None:
        super().__init__()
        vision, head = start.config.vision, start.head
        sizes = {"hidden_size": vision.width, "num_hidden_layers": vision.num_layers, "layer_norm_eps": vision.norm_eps}
        sizes |= {"num_attention_heads": vision.num_heads, "intermediate_size": vision.mlp_dim}
        config = TransformersConfig(**sizes, image_size=vision.image_size, patch_size=vision.patch_size)
        self.tower: Any = ViTModel(config, add_pooling_layer=False)
        renamed = {
            n.replace("encoder.layer", "layers"): x
            for n, x in Layout(VIT_TOWER).write(start.visual.state_dict()).items()
        }
        for old, new in _NAMES.items():
            renamed = {n.replace(old, new): x for n, x in renamed.items()}
        self.tower.load_state_dict(renamed)
        self.mlp = copy.deepcopy(head.mlp)
        self.last: Any = nn.utils.parametrizations.weight_norm(
            nn.Linear(head.last_layer.v.shape[1], len(head.last_layer.v), bias=False)
        )
        self.last.load_state_dict(
            {f"parametrizations.weight.original{i}": getattr(head.last_layer, x).detach() for i, x in enumerate("gv")}
        )
        self.last.parametrizations.weight.original0.requires_grad_(start.config.learns_norm)

    def forward(self, groups: list[Tensor]) -> Tensor:
        """Views of one size each, to the logits of all."""
        states = [self.tower(x, interpolate_pos_encoding=True).last_hidden_state[:, 0] for x in groups]
        return self.last(F.normalize(self.mlp(torch.cat(states)), dim=-1))


# of files and of modules
_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def theirs(config: DINOConfig, size: int) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model = Published(DINOModel(config)).to(DEVICE).train()
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    centre = torch.zeros(1, config.num_prototypes, device=DEVICE)
    averages: list[Tensor] = list(teacher.parameters())
    weights: list[Tensor] = list(model.parameters())
    groups = [x.flatten(0, 1) for x in views(config, size)]

    def step() -> Tensor:
        nonlocal centre
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
            with torch.no_grad():
                told = teacher(groups[:1])
            found = model(groups)
        logits = (found.float() / STUDENT).chunk(2 + NUM_SMALL)
        targets = ((told.float() - centre) / TEACHER).softmax(-1).chunk(2)
        pairs = [(q, x) for i, q in enumerate(targets) for j, x in enumerate(logits) if i != j]
        loss = sum(((-q * x.log_softmax(-1)).sum(-1).mean() for q, x in pairs), torch.zeros((), device=DEVICE)) / len(
            pairs
        )
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - MOMENTUM)
            centre = centre * 0.9 + told.float().mean(0, keepdim=True) * 0.1
        return loss.detach()

    return step


def made(contender: str, *, is_tiny: bool = False) -> Callable[[], Tensor]:
    return (ours if contender == "mmcore" else theirs)(shape(is_tiny=is_tiny), 4 if is_tiny else SIZE)


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """The last contender's weights are gone before the next one's are made."""
    yield
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("contender", CONTENDERS)
def test_dino_step(benchmark: Any, device: torch.device, contender: str) -> None:
    with torch.device("meta"):
        num_learned = sum(p.numel() for p in DINOModel(shape(is_tiny=False)).parameters())
    floor = UPDATE_BYTES * num_learned / machine_rates(device)[0]
    group = f"dino ViT-S-16 {SIDE} px B{SIZE} K{PROTOTYPES}"
    time_case(benchmark, device, Case(group, contender, made(contender), (), "step", floor))


def test_both_compute_the_same_losses() -> None:
    """At the first step, and at the third: so of the same gradients, steps, teachers and centres."""
    runs = [made(contender, is_tiny=True) for contender in CONTENDERS]
    for _ in range(3):
        one, other = (run().item() for run in runs)
        assert one == pytest.approx(other, rel=2e-2 if DEVICE.type == "cuda" else 1e-4)
