"""EMA(buffers="average"): statistics are averaged; what an average would spoil is taken as it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations

from mmcore.ema import EMA
from mmcore.nn import FeatureQueue


class Holder(nn.Module):
    def __init__(self, **held: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        for name, x in held.items():
            self.register_buffer(name, x)


class Own(Holder):
    copied_buffers = ("code",)


def averaged(model: nn.Module, step: Any, times: int = 5) -> EMA:
    ema = EMA(model, 0.9, buffers="average")
    for _ in range(times):
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        step()
        ema.update()
    return ema


def are_of_now(ema: EMA, *names: str) -> None:
    held = dict(ema.model.named_buffers())
    for name in names or held:
        assert torch.equal(ema.buffer_averages[name], held[name]), name


@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_spectral_norms_vectors_keep_their_norm(spectral_norm: Any) -> None:
    model: Any = nn.Sequential(spectral_norm(nn.Linear(6, 6)), nn.BatchNorm1d(6))
    ema = averaged(model, lambda: model(torch.randn(4, 6)))
    are_of_now(ema, *(name for name in ema.buffer_averages if name.startswith("0.")), "1.num_batches_tracked")
    assert len(ema.buffer_averages) == 5
    assert not torch.equal(ema.buffer_averages["1.running_mean"], model[1].running_mean)


def test_a_quantised_layer_keeps_its_ranges_and_scales_together() -> None:
    model = nn.Sequential(nn.Linear(3, 3), FakeQuantize(MovingAverageMinMaxObserver))
    are_of_now(averaged(model, lambda: model(torch.randn(4, 3))))


def test_a_mask_of_infinities_and_a_table_stay_what_they_are() -> None:
    mask, table = torch.full((3, 3), -torch.inf).triu(1), torch.rand(99)
    more = {"ids": torch.arange(3), "phases": torch.ones(2, dtype=torch.complex64)}
    model = Holder(mask=mask, table=table, float8=torch.ones(4).to(torch.float8_e4m3fn), **more)
    are_of_now(averaged(model, lambda: None, times=50))


def test_a_queue_and_what_a_module_names_are_copied() -> None:
    queue = FeatureQueue(4, 2)
    model = nn.Sequential(nn.Linear(1, 1), queue)
    are_of_now(averaged(model, lambda: queue.enqueue(nn.functional.normalize(torch.randn(3, 2)))))
    own: Any = Own(code=torch.zeros(3), mean=torch.zeros(3))
    ema = averaged(own, lambda: (own.code.add_(1), own.mean.add_(1)))
    are_of_now(ema, "code")
    assert (ema.buffer_averages["mean"] < own.mean).all()


def test_a_teacher_gets_the_vectors_of_now_too() -> None:
    pair: list[Any] = [parametrizations.spectral_norm(nn.Linear(6, 6)) for _ in range(2)]
    student, teacher = pair
    ema = EMA(student, 0.9, buffers="average", teacher=teacher)
    student(torch.randn(4, 6))
    ema.update()
    assert torch.equal(teacher.parametrizations.weight[0]._u, student.parametrizations.weight[0]._u)
