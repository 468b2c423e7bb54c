"""The tables that multi-tensor ops walk: made anew where tensors moved, of chunks once; never another's."""

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import (
    adamw_update_,
    adamw_update_ref_,
    clip_,
    ema_update_,
    ewc_penalty,
    fisher_accumulate_,
    global_norm,
    native,
)
from mmkernels._device import INTERPRETED
from mmkernels.multi_tensor import paths, table
from tests.kernels.tensor_lists import tensors
from tests.waits import Waits

pytestmark = pytest.mark.skipif(not (INTERPRETED or native.AVAILABLE), reason="ATen walks no table")

SIZES = [5000, 3, 4096]
LIKE: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]] = [
    (torch.float32, (6, 4), (4, 1)),
    (torch.float16, (6, 4), (4, 1)),
    (torch.bfloat16, (6, 4), (4, 1)),
    (torch.float32, (6, 4), (1, 6)),
    (torch.float32, (6, 4), (5, 1)),
    (torch.float32, (6, 4), (0, 1)),
    (torch.float32, (4, 6), (6, 1)),
    (torch.float32, (24,), (1,)),
    (torch.float32, (5, 4), (4, 1)),
    (torch.int32, (6, 4), (4, 1)),
]


class OnGpu(Tensor):
    """Poses as a tensor on a GPU."""

    is_cuda, is_cpu = True, False
    __torch_function__: Any = torch._C._disabled_torch_function_impl


class Elsewhere(Tensor):
    """Poses as a tensor on another device."""

    device = torch.device("cuda", 1)  # pyright: ignore[reportAssignmentType]
    __torch_function__: Any = torch._C._disabled_torch_function_impl


def posing(sizes: list[int], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.abs().as_subclass(OnGpu) for x in tensors(sizes, dtype, seed)]


def on_gpu(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's kernels walk, the native step does."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    if not INTERPRETED:
        monkeypatch.setattr(paths, "kernel", paths.blockwise)
    monkeypatch.setattr(table, "_CAPTURED", {})


@pytest.fixture
def capture(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    return lambda begins: monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: begins)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops whose lists were checked one by one."""
    done, check = [], paths._check_lists
    monkeypatch.setattr(paths, "_check_lists", lambda op, *rest: (done.append(op), check(op, *rest)))
    return done


def test_gradients_that_are_new_at_every_step_cost_one_table_of_chunks_and_one_check(checks: list[str]) -> None:
    table._chunks.cache_clear()
    found, expected = ([tensors(SIZES, torch.float32, i) for i in range(2)] for _ in range(2))
    for lists in (found, expected):
        lists += [[x.square() for x in part] for part in lists]
    kept = []
    for step in range(1, 21):
        grads = tensors(SIZES, torch.float32, step)
        kept += grads[: step % 3]  # so that some lie where others did, and some do not
        clip_(grads, 1e9)
        adamw_update_(found[0], grads, *found[2:], lr=0.01, step=step)
        adamw_update_ref_(expected[0], grads, *expected[2:], lr=0.01, step=step)
    assert table._chunks.cache_info().misses == 1
    assert checks == ["clip_", "adamw_update_"]
    for x, y in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def outcome(source: Tensor) -> Tensor | str:
    target = torch.arange(24.0).view(6, 4)
    try:
        ema_update_([target], [source], 0.5)
    except ValueError as error:
        return str(error)
    return target


@pytest.mark.parametrize("first", LIKE)
def test_another_tensor_at_the_address_of_one_that_went_is_taken_for_what_it_is(first: Any) -> None:
    memory = torch.rand(64)
    for dtype, shape, strides in LIKE:
        for like in (first, (dtype, shape, strides)):
            found = outcome(memory.view(like[0]).as_strided(like[1], like[2]))
        table._SEEN.clear()
        table._LAYOUTS.clear()
        expected = outcome(memory.clone().view(dtype).as_strided(shape, strides))
        assert type(found) is type(expected)
        if isinstance(expected, Tensor):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        else:
            assert found == expected


def test_a_living_tensor_whose_elements_are_others_is_looked_at_anew() -> None:
    target, source = torch.zeros(3, 4), torch.arange(12.0).view(3, 4)
    ema_update_([target], [source], 0.5)
    source.data = torch.ones(3, 4)
    ema_update_([target], [source], 0.0)
    assert torch.equal(target, torch.ones(3, 4))
    target.t_()
    with pytest.raises(ValueError, match=r"sources\[0\] must be \[4, 3\], got \[3, 4\]"):
        ema_update_([target], [source], 0.5)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "resized": lambda x: x.resize_(11),
    "set to a part of its memory": lambda x: x.set_(x.untyped_storage(), 0, (11,), (1,)),
    "given a part of its data": lambda x: setattr(x, "data", x.data[:11]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_living_tensor_that_is_cut_where_it_is_is_looked_at_anew(change: str) -> None:
    sources, found = [torch.ones(20), torch.ones(5)], torch.full((40,), 7.0)
    targets = [found[:20], torch.zeros(5)]
    ema_update_(targets, sources, 0.0)
    assert (found[:20] == 1).all() and (found[20:] == 7).all()
    CHANGES[change](targets[0])
    with pytest.raises(ValueError, match=r"sources\[0\] must be \[11\], got \[20\]"):
        ema_update_(targets, [2 * x for x in sources], 0.0)
    ema_update_(targets, [torch.full((11,), 3.0), sources[1]], 0.0)
    assert (found[:11] == 3).all() and (found[11:20] == 1).all() and (found[20:] == 7).all()


def test_what_moved_to_another_device_is_refused() -> None:
    lists = tensors([9], torch.float32, 0), tensors([9], torch.float32, 1)
    ema_update_(*lists, 0.5)
    with pytest.raises(ValueError, match=r"sources\[0\] must be on cpu, got cuda:1"):
        ema_update_(lists[0], [torch.ones(9).as_subclass(Elsewhere)], 0.5)


def test_what_moved_onto_what_is_written_is_refused() -> None:
    memory = torch.rand(40)
    ema_update_([memory[:10], memory[10:20]], [memory[20:30], memory[20:30]], 0.5)
    ema_update_([memory[10:20], memory[:10]], [memory[20:30], memory[30:]], 0.5)
    for target, source in ((0, 9), (11, 20), (20, 20)):
        lists = [memory[target : target + 10], memory[30:]], [memory[source : source + 10], memory[:10]]
        with pytest.raises(ValueError, match="must share no memory with"):
            ema_update_(*lists, 0.5)
    freed = torch.ones(10)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"sources\[1\] must hold its elements, got a tensor that was freed"):
        ema_update_([memory[:10], memory[10:20]], [memory[20:30], freed], 0.5)


def test_no_cache_grows_without_end_or_keeps_a_tensor_alive() -> None:
    kept = [tensors([n], torch.float32, n) for n in range(table.MAX_LISTS + 20)]
    same = tensors((table.MAX_PLACES + 3) * [7], torch.float32, 0)
    for x in itertools.chain(*kept, same):
        global_norm([x])
    assert len(table._SEEN) == len(table._LIKES) == table.MAX_LISTS
    assert len(table._LAYOUTS) == table._chunks.cache_info().currsize == table.MAX_TABLES
    assert max(len(layout.tables) for layout in table._LAYOUTS.values()) == table.MAX_PLACES
    living = [weakref.ref(x) for x in itertools.chain(*kept, same)]
    kept, same, x = [], [], None
    gc.collect()
    assert not any(ref() is not None for ref in living)
    assert len(table._SEEN) < table.MAX_LISTS


def test_another_default_device_is_not_that_of_the_tables() -> None:
    x = [torch.full((9,), 2.0)]
    with torch.device("meta"):
        adamw_update_(x, [x[0].clone()], [x[0].clone()], [x[0].clone()], lr=0.1, step=1)
        norm = global_norm(x)
    assert norm.device.type == "cpu" and x[0].isfinite().all()


# by the number that each takes from the host, of five lists and one in bfloat16
NUMBERS: dict[str, Callable[..., Any]] = {
    "lr": lambda x, value: adamw_update_(*x[:4], lr=value, step=on_gpu(2)),
    "step": lambda x, value: adamw_update_(*x[:4], lr=on_gpu(0.1), step=value),
    "decay": lambda x, value: adamw_update_(*x[:4], lr=on_gpu(0.1), step=on_gpu(2), averages=x[4], decay=value),
    "norm": lambda x, value: clip_(x[0], 0.5, norm=value),
    "decay of an average": lambda x, value: ema_update_(x[0], x[1], value),
    "seed": lambda x, value: ema_update_(x[5], x[0], on_gpu(0.5), rounding="stochastic", seed=value),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_graph_is_captured_of_numbers_on_the_device_alone(name: str, capture: Callable[[bool], None]) -> None:
    """There they are what they are from the host."""
    call = NUMBERS[name]
    found, expected = ([*(posing(SIZES, i) for i in range(5)), posing(SIZES, 5, torch.bfloat16)] for _ in range(2))
    for lists in (found, expected):
        call(lists, 1)
    capture(True)
    for wrong in (1, torch.tensor(1)):
        sentence = rf": {name.split()[0]} must be a tensor on cpu while a CUDA graph is captured, .*, got "
        with pytest.raises(ValueError, match=sentence):
            call(found, wrong)
    call(found, on_gpu(1))
    capture(False)
    call(expected, 1)
    for x, y in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert torch.equal(x, y)


def test_a_default_that_no_average_needs_is_no_number_of_a_graph(capture: Callable[[bool], None]) -> None:
    lists = [posing(SIZES, i) for i in range(4)]
    for is_capturing in (False, True):
        capture(is_capturing)
        adamw_update_(*lists, lr=on_gpu(0.1), step=on_gpu(1))


@pytest.mark.parametrize("name", ["global_norm", "ema_update_"])
def test_no_table_is_made_in_a_capture_and_none_that_was_used_in_one_goes(
    name: str, capture: Callable[[bool], None]
) -> None:
    calls = {"global_norm": lambda x, y: global_norm(x), "ema_update_": lambda x, y: ema_update_(x, y, on_gpu(0.5))}
    call = calls[name]
    lists, moved = ([posing([11, 4097], i) for i in seeds] for seeds in ((0, 1), (2, 3)))
    sentence = f"^{name}: tensors must be ones that it was called with before the capture of a CUDA graph"
    capture(True)
    with pytest.raises(ValueError, match=sentence):
        call(*lists)
    capture(False)
    call(*lists)
    capture(True)
    call(*lists)
    with pytest.raises(ValueError, match=sentence):
        call(*moved)
    (used,) = table._CAPTURED.values()
    assert used.tensors[:, 2].tolist() == [x.data_ptr() for x in lists[0]]


def test_nothing_waits_for_the_device(gpu: None) -> None:
    params, moments, squares, averages, fishers, anchors = (posing(SIZES, i) for i in range(6))
    wanted = [x.detach().as_subclass(OnGpu).requires_grad_() for x in params]
    with Waits("mmkernels", counts_uploads=True) as waits:
        for step in range(3):
            grads = posing(SIZES, step)
            norm = global_norm(grads)
            clip_(grads, 1.0, norm=norm.as_subclass(OnGpu))
            clip_(grads, 1.0)
            for numbers in ((0.1, step + 1, 0.9), map(on_gpu, (0.1, step + 1, 0.9)), (on_gpu(0.1), 2, 0.9)):
                lr, t, decay = numbers
                adamw_update_(params, grads, moments, squares, lr=lr, step=t, averages=averages, decay=decay)
            ema_update_(averages, params, 0.9)
            ema_update_(averages, params, on_gpu(0.9))
            fisher_accumulate_(fishers, grads, decay=0.9)
            ewc_penalty(wanted, anchors, fishers, 0.5).backward()
    assert not waits.lines


def test_the_counter_sees_a_wait(gpu: None) -> None:
    with Waits("mmkernels") as waits:
        clip_(posing(SIZES, 0), 1.0, error_if_nonfinite=True)
    assert [line.split(":")[0] for line in waits.lines] == ["mmkernels/multi_tensor/norm.py"]
