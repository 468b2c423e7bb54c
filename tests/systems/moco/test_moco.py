"""MoCo's 1 + K logits against the published formula and lightly's, in float64; its queue, its teacher, its versions."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.data.transforms import views as published
from mmcore.nn import FeatureQueue, MomentumEncoder
from mmcore.systems.moco.model import MoCoConfig, MoCoModel, queue_losses, random_keys
from mmcore.systems.moco.recipe import MoCo
from tests.systems.two_views import (
    NARROW,
    NUM,
    WIDTH,
    agree,
    engine,
    lightly,
    moved,
    shared,
    small,
    step,
    torchs,
    views,
)

K = 10


def written_out(queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """The key first among the queue's, at temperature 0.2."""
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1) / 0.2
    return F.cross_entropy(logits, torch.zeros(NUM, dtype=torch.int64))


@pytest.mark.parametrize(("version", "peer", "head_norm"), [
    (1, "formulas", False), (2, "formulas", False), (2, "formulas", True), (1, "lightly", False), (2, "lightly", False),
])  # fmt: skip
def test_the_loss_and_every_gradient_are_the_originals_and_the_batchs_other_keys_count_for_nothing(
    version: Any, peer: str, head_norm: bool
) -> None:
    config = partial(MoCoConfig, head_norm=head_norm)
    model: Any = small(MoCoModel, (WIDTH, NARROW)[2 - version :], config=config)
    teacher = MomentumEncoder(model, 0.5)
    moved(model)
    queue, images = FeatureQueue(K, NARROW).double(), views()
    queue.enqueue(random_keys(K, NARROW, 0))
    known = queue.filled
    head = torchs(model.projector)
    if peer == "lightly" and version == 2:
        head = shared(lightly("MoCoProjectionHead")(WIDTH, WIDTH, NARROW), model.projector)
    read, other = model.visual(images[:, 0])[:, 1:].mean(1), teacher.teacher.visual(images[:, 1])[:, 1:].mean(1)  # pyright: ignore[reportCallIssue]
    queries, keys = head(read), teacher.teacher.projector(other).detach()  # pyright: ignore[reportCallIssue]
    if peer == "lightly":
        theirs = lightly("NTXentLoss")(0.2, (K, NARROW))
        theirs.memory_bank.bank, theirs.memory_bank.bank_ptr = known.clone(), torch.zeros(1, dtype=torch.int64)
        expected = theirs(queries, keys)
    else:
        expected = written_out(F.normalize(queries, dim=1), F.normalize(keys, dim=1), known)
    ours = MoCo(version=version, temperature=0.2).loss(model, images, step(teacher=teacher, queue=queue))
    agree(model, ours["loss"], expected, but=("visual.class_embedding",))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    # read before the batch's keys entered, which lie in it now
    torch.testing.assert_close(queue.filled[:NUM], F.normalize(keys, dim=1))


def test_a_queue_takes_batches_of_any_size_and_begins_with_unit_vectors_that_all_ranks_share() -> None:
    recipe, model = MoCo(queue_size=5), small(MoCoModel, (WIDTH, NARROW), config=MoCoConfig).float()
    found: Any = recipe.companions(engine(model))
    queue, images = found["queue"], views().float()
    torch.testing.assert_close(queue.filled.norm(dim=1), torch.ones(5))
    assert torch.equal(queue.filled, recipe.companions(engine(model))["queue"].filled)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue, reportArgumentType]
    for size in (NUM, 4, 1):  # more than it holds, no divisor of it, the last of an epoch
        assert recipe.loss(model, images[:size], step(**found))["loss"].isfinite()
    keys = F.normalize(torch.cat(found["teacher"](images[:4, 1:], only_projections=True)), dim=1)
    assert all((queue.filled - key).norm(dim=1).min() < 1e-5 for key in keys)


def test_the_teacher_moves_by_its_momentum_and_no_further() -> None:
    recipe, model = MoCo(teacher_momentum=0.9), small(MoCoModel, (WIDTH, NARROW), config=MoCoConfig).float()
    teacher: Any = recipe.companions(engine(model))["teacher"]
    before = {name: x.clone() for name, x in teacher.teacher.named_parameters()}
    moved(model).float()
    recipe.after_step(engine(model), step(teacher=teacher))
    for name, x in teacher.teacher.named_parameters():
        torch.testing.assert_close(x, 0.9 * before[name] + 0.1 * model.get_parameter(name))


def test_the_versions_differ_in_head_views_and_temperature() -> None:
    first, second = MoCo(version=1, model="ViT-S-16"), MoCo(model="ViT-S-16")
    assert first.shape().projector == (128,) and second.shape().projector == (384, 128)
    assert (first.published_views, second.published_views) == (published.MOCO_V1, published.MOCO_V2)
    queries, keys = (F.normalize(torch.randn(3, 4), dim=1) for _ in range(2))
    assert torch.equal(queue_losses(queries, keys, keys[:0], 0.2), torch.zeros(3))


@pytest.mark.parametrize(("flags", "said"), [
    ({"version": 1, "head_norm": True}, "moco: --head-norm has no effect with --version 1"),
    ({"queue_size": 0}, "moco: --queue-size must be at least 1, got 0"),
    ({"teacher_momentum": 1.5}, "moco: --teacher-momentum must be from 0 to 1, got 1.5"),
    ({"temperature": -1.0}, "moco: --temperature must be above 0, got -1.0"),
])  # fmt: skip
def test_flags_that_mean_nothing_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MoCo(**flags).assets(None)  # pyright: ignore[reportArgumentType]
