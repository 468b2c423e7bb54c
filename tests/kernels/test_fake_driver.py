"""The fake driver: what it records is what was asked for, what would wait is an error, and nothing of it stays."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import mmkernels as mk
from mmkernels._device import runs_triton
from tests.kernels.fake_driver import FAKED, FakeGpu, Waited, host_times, without_data

pytestmark = pytest.mark.skipif(not FAKED, reason="needs triton's driver, not its interpreter")


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with FakeGpu() as gpu:
        yield gpu


def features(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)


def test_nothing_of_it_stays() -> None:
    from triton.runtime import jit  # noqa: PLC0415 (takes longer than torch)
    from triton.runtime.driver import driver  # noqa: PLC0415

    def state() -> list[object]:
        cuda = torch.cuda
        calls = [cuda.device, cuda.is_available, cuda.is_current_stream_capturing, cuda.get_device_capability]
        return [*calls, driver._active, jit.JITFunction._do_compile, Tensor.to, Tensor.cpu, torch.tensor]

    x, before = torch.zeros(3), state()
    with pytest.raises(KeyError), FakeGpu() as gpu, without_data(gpu), gpu.record(device=1):
        assert x.is_cuda and not x.is_cpu and x.device == torch.device("cuda:1")
        raise KeyError
    assert state() == before and not x.is_cuda and x.is_cpu and x.device.type == "cpu" and not runs_triton(x)
    with pytest.raises(NotImplementedError):
        torch.mm(features(2, 2), features(2, 2), out_dtype=torch.float32)


def test_it_records_launches_and_calls_within_registered_ops(gpu: FakeGpu) -> None:
    student, teacher = features(8, 40), torch.randn(8, 40)
    with gpu.record() as found:
        mk.distillation_loss(student, teacher, 0.1, 0.1).backward()
    assert [(x.kernel, x.grid) for x in found.launches] == [
        ("_distillation_loss_fwd_kernel", (8, 1, 1)),
        ("_distillation_loss_bwd_kernel", (8, 1, 1)),
    ]
    assert found.aten["sum"] and found.views["empty"] + found.views["empty_like"] + found.views["new_empty"]
    assert 0 < len(found.launches) < found.num_kernels < found.num_calls
    with gpu.record() as again:
        mk.distillation_loss(student[:5], teacher[:5], 0.1, 0.1)
    assert again.keys <= found.keys and len(again.launches) == 1
    with gpu.record() as other:
        mk.distillation_loss(student.half(), teacher, 0.1, 0.1)
    assert not other.keys & found.keys


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to('cpu')": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "where": lambda x: torch.where(x > 0),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "an event": lambda x: torch.cuda.Event().synchronize(),
    "as_tensor": lambda x: torch.as_tensor(3.0, device=x.device),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_would_wait_is_an_error(name: str, gpu: FakeGpu) -> None:
    x = torch.ones(4)
    with gpu.record(), pytest.raises(Waited):
        WAITING[name](x)
    with gpu.record(may_wait=True) as found:
        WAITING[name](x)
    assert len(found.waits) == 1 and "test_fake_driver.py" in found.waits[0]


def test_what_does_not_wait_is_none(gpu: FakeGpu) -> None:
    x, numbers = torch.ones(4), torch.tensor([1, 2], device="cpu")
    with gpu.record():
        y = torch.full((), 3.0, device=x.device) * x.clone()
        y[numbers] = x[numbers].to(torch.float16).float()
        y.masked_fill_(y > 2, 0).to(x.device, torch.float64)
        torch.tensor([1, 2], device="cpu")


def test_sizes_of_any_kind_take_no_memory(gpu: FakeGpu) -> None:
    a = torch.empty(1 << 20, 4096, dtype=torch.bfloat16, device="meta")
    with without_data(gpu), gpu.record() as found:
        mk.contrastive_lse(a, a, 10.0)
    assert "_contrastive_fwd_kernel" in {x.kernel for x in found.launches}


def test_the_host_time_of_calls_in_turns(gpu: FakeGpu) -> None:
    x = torch.ones(4)

    def adds(num: int) -> None:
        for _ in range(num):
            x.add(x)

    found = host_times({"one": lambda: adds(10), "ten": lambda: adds(100)}, rounds=3)
    assert 3 * found["one"] < found["ten"] < 30 * found["one"]
