"""What every update of lists promises beyond the contract that every op obeys."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels as mk
from mmkernels._device import INTERPRETED
from tests.kernels.tensor_lists import ALL, tensors

Lists = list[list[Tensor]]
# an update that writes its first list, and the dtypes of its lists; owners are bytes
UPDATES: dict[str, tuple[Callable[..., Any], str]] = {
    "ema_update_": (lambda t, s: mk.ema_update_(t, s, 0.5), "ff"),
    "adamw_update_": (lambda *lists: mk.adamw_update_(*lists, lr=0.1, step=2), "ffff"),
    "fisher_accumulate_": (lambda f, g: mk.fisher_accumulate_(f, g, weight=0.5, decay=0.9), "ff"),
    "clip_": (lambda x: mk.clip_(x, 0.5), "f"),
    "apply_masks_": (lambda x, owners: mk.apply_masks_(x, owners, owners=(1, 2)), "fb"),
}
# of an update or its reference all lists that it takes, and their dtypes: any, float32, bytes
EVERYTHING: dict[str, tuple[Callable[..., Any], str]] = {
    "ema_update": (lambda fn, t, s, shadows: fn(t, s, 0.5, shadows=shadows), "xxx"),
    "adamw_update": (lambda fn, *x: fn(*x[:4], averages=x[4], copies=x[5], shadows=x[6], **SETTINGS), "xxfffxx"),
    "fisher_accumulate": (lambda fn, fishers, grads: fn(fishers, grads, weight=0.5, decay=0.9), "fx"),
    "clip": (lambda fn, x: fn(x, 0.5), "x"),
    "apply_masks": (lambda fn, x, owners: fn(x, owners, owners=(1, 2)), "xb"),
}
SETTINGS: dict[str, Any] = {"lr": 0.01, "step": 3, "clamp": (-1.5, 1.5), "decay": 0.9}
each_update = pytest.mark.parametrize("name", UPDATES)


def drawn(name: str, sizes: list[int], dtype: torch.dtype = torch.float32) -> Lists:
    """Numbers that serve as moments too."""
    kinds = UPDATES[name][1]
    lists = [[x.abs() for x in tensors(sizes, torch.float32, i)] for i in range(len(kinds))]
    lists[0] = [x.to(dtype) for x in lists[0]]
    return [[(2 * x).byte() for x in part] if kind == "b" else part for part, kind in zip(lists, kinds)]


def copied(lists: Lists) -> Lists:
    return [[x.clone(memory_format=torch.contiguous_format) for x in part] for part in lists]


def assert_equal(found: Lists, expected: Lists) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@each_update
def test_no_list_is_no_work(name: str, path: str) -> None:
    update, kinds = UPDATES[name]
    update(*([] for _ in kinds))
    update(*drawn(name, [0]))


@pytest.mark.parametrize("name", EVERYTHING)
def test_one_call_takes_tensors_of_any_dtypes_and_computes_in_float32(name: str, path: str) -> None:
    call, kinds = EVERYTHING[name]
    dtypes = {"x": ALL, "f": (torch.float32,), "b": (torch.uint8,)}
    combinations = list(itertools.product(*(dtypes[kind] for kind in kinds)))
    sizes = [4103] * len(combinations) + [0, 1, 4096]
    found = [
        [x.to(of_lists[i]) for x, of_lists in zip(tensors(sizes, torch.float32, i), itertools.cycle(combinations))]
        for i in range(len(kinds))
    ]
    if name == "adamw_update":
        found[3] = [x.abs() for x in found[3]]
    expected = [[x.double() if x.is_floating_point() else x for x in part] for part in found]
    call(getattr(mk, f"{name}_"), *found)
    call(getattr(mk, f"{name}_ref_"), *expected)
    for x, gold in zip(*(itertools.chain(*lists) for lists in (found, expected)), strict=True):
        if x.is_floating_point():
            # one rounding, which the interpreter cuts where a GPU rounds
            places = 2 if INTERPRETED or x.dtype == torch.float32 else 1
            torch.testing.assert_close(x, gold.to(x.dtype), rtol=places * torch.finfo(x.dtype).eps, atol=1e-6)


@each_update
def test_an_update_is_seen_by_what_was_saved_for_a_backward(name: str) -> None:
    lists = drawn(name, [3])
    loss = (torch.ones(3, requires_grad=True) * lists[0][0]).sum()
    UPDATES[name][0](*lists)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_update
def test_it_compiles_into_a_graph_that_writes_in_place(name: str) -> None:
    def step(*lists: list[Tensor]) -> Tensor:
        result = UPDATES[name][0](*lists)
        return lists[0][0] + (1 if result is None else result)

    torch._dynamo.reset()
    found, expected = drawn(name, [5, 3]), drawn(name, [5, 3])
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*found)
    assert torch.equal(result, step(*expected))
    assert_equal(found, expected)


@each_update
def test_parameters_that_want_gradients_are_written_without_any(name: str, path: str) -> None:
    lists = drawn(name, [12, 4])
    before, lists[0] = lists[0], [x.clone().requires_grad_() for x in lists[0]]
    UPDATES[name][0](*lists)
    for x, y in zip(lists[0], before, strict=True):
        assert x.requires_grad and x.grad_fn is None and not torch.equal(x, y)


@each_update
def test_dense_tensors_of_any_strides_are_written_in_place(name: str, path: str) -> None:
    """Beside lists of other strides, and of none."""
    lists = [[x.view(3, 4, 5, 6) for x in part] for part in drawn(name, [360])]
    lists[0] = [x.to(memory_format=torch.channels_last) for x in lists[0]]
    for others in (lists[1:], [[x[:1, :, :1].expand(3, 4, 5, 6) for x in part] for part in lists[1:]]):
        if name == "adamw_update_":  # moments lie as their parameters do
            moments = [[torch.empty_like(lists[0][0]).copy_(x) for x in part] for part in others[1:]]
            others = [others[0], *moments]
        expected = copied([lists[0], *others])
        UPDATES[name][0](lists[0], *others)
        UPDATES[name][0](*expected)
        torch.testing.assert_close(lists[0], expected[0])


@each_update
def test_parts_of_a_tensor_at_odd_addresses_are_written_and_nothing_beside_them(name: str, path: str) -> None:
    for dtype in (torch.float32,) if name == "fisher_accumulate_" else ALL:
        (whole,), *others = drawn(name, [9000], dtype)
        before = whole.clone()
        lists = [[whole[1:4098], whole[4100:8999]], *([x[3:4100], x[4101:9000]] for (x,) in others)]
        expected = copied(lists)
        UPDATES[name][0](*lists)
        UPDATES[name][0](*expected)
        torch.testing.assert_close(lists[0], expected[0])
        untouched = [0, 4098, 4099, 8999]
        assert torch.equal(whole[untouched], before[untouched])


def test_the_registered_ops_pass_opcheck() -> None:
    x, y, z = (tensors([5, 0, 7], dtype, i) for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32)))
    params, one, kept = [p.clone().requires_grad_() for p in x], torch.tensor(1.0), [p > 0 for p in x]
    calls: dict[str, tuple[Any, ...]] = {
        "global_norm": (x,), "clip": (x, 3 * one, 1.0), "apply_masks": (x, kept, 1, 255),
        "fisher_accumulate": (z, y, 0.5, 0.9), "ewc_penalty_fwd": (params, y, z, 0.5),
        "ewc_penalty_bwd": (x, y, z, one, 0.5),
    }  # fmt: skip
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.mmkernels, name).default, arguments)


def test_torch_compile_captures_no_op_that_reads_addresses_from_the_host() -> None:
    names = "adamw_update ema_update fisher_accumulate ewc_penalty_fwd ewc_penalty_bwd global_norm clip apply_masks"
    assert all(torch.Tag.cudagraph_unsafe in getattr(torch.ops.mmkernels, x).default.tags for x in names.split())
