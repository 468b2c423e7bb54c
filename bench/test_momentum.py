"""`mmcore.nn.MomentumEncoder` and `FeatureQueue` as MoCo and ALBEF use them: the encoder's update, the queue's, and a
step of both around the loss, beside the loops that their authors publish.

The roofline of an update is a copy of its bytes, 12 a parameter, that of a step its loss's products besides.
"""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, time_case
from bench.measure import assert_agrees, gemm_flops_per_s, machine_rates, relative_error
from mmcore.nn import FeatureQueue, MomentumEncoder
from mmcore.parts.vit import ViT
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmkernels import contrastive_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# MoCo's batch, queue and features; a GPU has the queue of its paper
ROWS, QUEUE, WIDTH = (256, 65536, 256) if DEVICE == "cuda" else (64, 16384, 256)
DECAY, SCALE = 0.99, 1 / 0.07
BYTES, NAME = 12, "transformer.blocks.0.mlp.fc1.weight"


class Ours:
    """MomentumEncoder, FeatureQueue and contrastive_loss."""

    def __init__(self, student: ViT, queue: Tensor) -> None:
        self.momentum = MomentumEncoder(student, DECAY)
        self.queue = FeatureQueue(len(queue), queue.shape[1]).to(queue.device)
        self.queue.enqueue(queue)

        self.teacher = self.momentum.teacher

    @property
    def held(self) -> Tensor:
        return self.queue.features

    def update(self) -> None:
        self.momentum.update()

    def enqueue(self, keys: Tensor) -> None:
        self.queue.enqueue(keys)

    def loss(self, queries: Tensor, keys: Tensor) -> Tensor:
        return contrastive_loss(queries, keys, SCALE, negatives=self.queue.filled, symmetric=False)


class MoCo:
    """A loop over parameters, a pointer into a transposed queue, all logits; the batch's other keys are negatives as
    well, which the official code leaves to the queue."""

    def __init__(self, student: ViT, queue: Tensor) -> None:
        self.student, self.teacher = student, copy.deepcopy(student).requires_grad_(False)
        self.queue, self.place = queue.T.clone(), 0

    @property
    def held(self) -> Tensor:
        return self.queue.T

    def update(self) -> None:
        for p, q in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            p.data = p.data * DECAY + q.data * (1.0 - DECAY)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        self.queue[:, self.place : self.place + len(keys)] = keys.T
        self.place = (self.place + len(keys)) % self.queue.shape[1]

    def loss(self, queries: Tensor, keys: Tensor) -> Tensor:
        logits = torch.cat([queries @ keys.T, queries @ self.queue.clone().detach()], 1) * SCALE
        return F.cross_entropy(logits, torch.arange(len(queries), device=queries.device))


class Foreach(MoCo):
    """The average by foreach, and a queue that is concatenated."""

    def update(self) -> None:
        with torch.no_grad():
            averages: list[Tensor] = list(self.teacher.parameters())
            weights: list[Tensor] = list(self.student.parameters())
            torch._foreach_lerp_(averages, weights, 1 - DECAY)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        self.queue = torch.cat([self.queue[:, len(keys) :], keys.T], 1)


CONTENDERS: dict[str, type[Ours] | type[MoCo]] = {"mmcore": Ours, "loop, pointer": MoCo, "foreach, cat": Foreach}


@functools.cache
def student() -> ViT:
    """CLIP ViT-B/32's tower."""
    torch.manual_seed(0)
    return ViT(CLIP_CONFIGS["ViT-B-32"].vision).to(DEVICE)


@functools.cache
def features() -> tuple[Tensor, Tensor, Tensor]:
    """Of unit norm: queries, which are a leaf, their keys, and a queue."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    queries, noise, queue = (
        F.normalize(torch.randn(n, WIDTH, generator=generator, device=DEVICE), dim=1) for n in (ROWS, ROWS, QUEUE)
    )
    keys = F.normalize(0.5 * queries + noise, dim=1)
    return queries.requires_grad_(), keys, queue


def made(contender: str) -> Ours | MoCo:
    """With a student that has gone on."""
    found = CONTENDERS[contender](student(), features()[2])
    with torch.no_grad():
        for p in student().parameters():
            p.mul_(1.01)
    return found


def update_s(device: torch.device) -> float:
    """Of a copy of the bytes."""
    return BYTES * sum(p.numel() for p in student().parameters()) / machine_rates(device)[0]


@pytest.mark.parametrize("contender", CONTENDERS)
def test_momentum_encoder(benchmark: Any, device: torch.device, contender: str) -> None:
    found = made(contender)
    averaged, of_student = (x.get_parameter(NAME) for x in (found.teacher, student()))
    expected = averaged.double() * DECAY + of_student.detach().double() * (1 - DECAY)
    found.update()
    averaged = found.teacher.get_parameter(NAME)
    assert_agrees(averaged, expected)
    error = relative_error(averaged, expected)
    case = Case(
        group="MomentumEncoder ViT-B-32",
        contender=contender,
        loss=found.update,
        wrt=(),
        mode="update",
        floor_s=update_s(device),
        error=lambda: error,
    )
    time_case(benchmark, device, case)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_feature_queue(benchmark: Any, device: torch.device, contender: str) -> None:
    _, keys, queue = features()
    found = CONTENDERS[contender](student(), queue)
    found.enqueue(keys)
    sets = found.held, torch.cat([queue[ROWS:], keys])
    assert torch.equal(*(x[x[:, 0].argsort()] for x in sets))
    case = Case(
        group=f"FeatureQueue N{QUEUE}-B{ROWS}-D{WIDTH}",
        contender=contender,
        loss=lambda: found.enqueue(keys),
        wrt=(),
        mode="update",
        floor_s=2 * keys.nbytes / machine_rates(device)[0],
    )
    time_case(benchmark, device, case)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_moco_step(benchmark: Any, device: torch.device, contender: str) -> None:
    """All of MoCo's step but the passes of its encoders: update, loss with its gradient, enqueue."""
    (queries, keys, queue), found = features(), made(contender)
    wide = queries.detach().double().requires_grad_()
    loss = contrastive_loss(wide, keys.double(), SCALE, negatives=queue.double(), symmetric=False)
    (expected,) = torch.autograd.grad(loss, wide)
    (dq,) = torch.autograd.grad(found.loss(queries, keys), queries)
    assert_agrees(dq, expected)

    def step() -> None:
        found.update()
        torch.autograd.grad(found.loss(queries, keys), queries)
        found.enqueue(keys)

    rate = gemm_flops_per_s(ROWS, QUEUE, WIDTH, torch.float32, device)
    case = Case(
        group=f"moco-step ViT-B-32-N{QUEUE}-B{ROWS}-D{WIDTH}",
        contender=contender,
        loss=step,
        wrt=(queries,),
        mode="step",
        floor_s=update_s(device) + 4 * ROWS * (QUEUE + ROWS) * WIDTH / rate,
        error=lambda: relative_error(dq, expected),
    )
    time_case(benchmark, device, case)
