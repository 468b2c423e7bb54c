"""A momentum encoder and its queue: MoCo's expression, resumed and moved to the bit, negatives that were enqueued."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcore.ema import cosine, warmed_up
from mmcore.nn import FeatureQueue, MomentumEncoder
from mmcore.ops import contrastive_loss
from tests.refusals import refuses


def student(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def walk(model: nn.Module, momentum: MomentumEncoder, first: int, steps: int) -> None:
    """Noisy steps, the noise of a step its own."""
    for step in range(first, first + steps):
        torch.manual_seed(step)
        dtype = next(model.parameters()).dtype
        model(torch.randn(4, 3).to(dtype))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape).to(dtype))
        momentum.update()


class TestMomentumEncoder:
    def test_is_mocos_expression_and_a_frozen_module_of_its_own(self) -> None:
        model, x = student(), torch.randn(4, 3)
        momentum, expected = MomentumEncoder(model, 0.9), copy.deepcopy(model)
        for step in range(3):
            walk(model, momentum, step, 1)
            with torch.no_grad():
                for p, q in zip(expected.parameters(), model.parameters(), strict=True):
                    p.copy_(p * 0.9 + q * 0.1)
                for p, q in zip(expected.buffers(), model.buffers(), strict=True):
                    p.copy_(q)
        y = momentum(x.requires_grad_())
        torch.testing.assert_close(y, expected(x))
        assert not y.requires_grad and not any(p.requires_grad for p in momentum.parameters())
        assert {name.split(".")[0] for name in momentum.state_dict()} == {"teacher", "_extra_state"}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("moves", [False, True])
    def test_goes_on_to_the_bit_where_it_was_saved(self, dtype: torch.dtype, moves: bool) -> None:
        models = [student().to(dtype) for _ in range(2)]
        whole, first = (MomentumEncoder(model, warmed_up(0.9995)) for model in models)
        walk(models[0], whole, 0, 5)
        walk(models[1], first, 0, 3)
        file = io.BytesIO()
        torch.save((first.state_dict(), models[1].state_dict()), file)
        file.seek(0)
        state, weights = torch.load(file, weights_only=True)
        parent = nn.ModuleList([student(1).to(torch.float32 if moves else dtype)])
        parent.append(MomentumEncoder(parent[0], warmed_up(0.9995)))
        if moves:
            parent.to(dtype)
        again: Any = parent[1]
        parent[0].load_state_dict(weights)
        again.load_state_dict(state)
        walk(parent[0], again, 3, 2)
        assert again.ema.num_updates == 5
        for name, x in whole.ema.averages.items():
            assert x.dtype == torch.float32 and torch.equal(x, again.ema.averages[name])
        for name, x in whole.teacher.state_dict().items():
            assert torch.equal(x, again.teacher.state_dict()[name])

    def test_goes_on_where_it_was_moved_in_training(self) -> None:
        models = [student(), student()]
        moved, still = (MomentumEncoder(model, cosine(0.9, 1.0, 9)) for model in models)
        walk(models[0], moved, 0, 2)
        walk(models[1], still, 0, 2)
        nn.ModuleList([models[0], moved]).double().float()
        walk(models[0], moved, 2, 2)
        walk(models[1], still, 2, 2)
        assert all(torch.equal(x, moved.ema.averages[name]) for name, x in still.ema.averages.items())

    def test_of_weights_that_zero_3_cut_up_is_refused(self) -> None:
        model = nn.Linear(2, 2)
        model.weight.ds_id = 0  # pyright: ignore
        refuses(r"MomentumEncoder: student must hold its weights, got \['weight'\]", MomentumEncoder, model)


def rows(first: int, num: int, dim: int = 2) -> Tensor:
    return torch.arange(first, first + num, dtype=torch.float32)[:, None].expand(num, dim)


class TestFeatureQueue:
    @pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (3, 3, 3, 3), (5, 1, 4), (7, 2), (12, 1), (0, 3)])
    def test_holds_the_last_that_were_enqueued(self, sizes: tuple[int, ...]) -> None:
        queue, first = FeatureQueue(5, 2), 0
        assert queue.filled.shape == (0, 2)
        for num in sizes:
            queue.enqueue(rows(first, num))
            first += num
            held = sorted(queue.filled[:, 0].tolist())
            assert held == [float(i) for i in range(max(first - 5, 0), first)]

    def test_is_the_negatives_of_a_loss_and_zeros_are_none(self) -> None:
        torch.manual_seed(0)
        queue, seen = FeatureQueue(7, 4), torch.randn(9, 4)
        a, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
        for first in range(0, 10, 3):
            negatives = seen[max(first - 7, 0) : first]
            logits = 2.0 * torch.cat([a @ b.T, a @ negatives.T], 1)
            expected = nn.functional.cross_entropy(logits, torch.arange(3))
            loss = contrastive_loss(a, b, 2.0, symmetric=False, negatives=queue.filled)
            torch.testing.assert_close(loss, expected)
            queue.enqueue(seen[first : first + 3])  # before backward
            grads = [torch.autograd.grad(y, a)[0] for y in (loss, expected)]
            torch.testing.assert_close(*grads)

    def test_keeps_no_graph_and_goes_on_where_it_was_saved(self) -> None:
        queue, again = FeatureQueue(5, 2), FeatureQueue(5, 2)
        queue.enqueue(rows(0, 8).clone().requires_grad_().bfloat16())
        again.load_state_dict(queue.state_dict())
        for q in (queue, again):
            q.enqueue(rows(8, 3))
        assert not queue.filled.requires_grad
        assert torch.equal(queue.features, again.features) and queue.num_enqueued == again.num_enqueued == 11

    def test_refuses_by_name(self) -> None:
        refuses("FeatureQueue: num_features must be at least 1, got 0", FeatureQueue, 0, 2)
        refuses("FeatureQueue: dim must be at least 1, got 0", FeatureQueue, 2, 0)
        message = r"FeatureQueue: features must be \[B, 2\], got \[4, 3\]"
        refuses(message, FeatureQueue(5, 2).enqueue, torch.zeros(4, 3))
