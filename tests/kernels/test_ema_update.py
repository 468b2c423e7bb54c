"""What ema_update_ promises beyond the contract that every op obeys."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmkernels import ema_update_, ema_update_ref_
from mmkernels._device import INTERPRETED
from mmkernels.multi_tensor import table
from tests.kernels.tensor_lists import ALL, HALVES, tensors


@pytest.mark.parametrize("dtypes", itertools.product(ALL, ALL, (None, *ALL)), ids=str)
def test_any_dtypes_are_averaged_in_float32(dtypes: tuple[Any, ...], walk: str) -> None:
    sizes = [1, 4096, 300, 0, 4103]
    targets, sources = (tensors(sizes, dtype, i) for i, dtype in enumerate(dtypes[:2]))
    means = [torch.lerp(t.float(), s.float(), 0.1) for t, s in zip(targets, sources, strict=True)]
    shadows = None if dtypes[2] is None else tensors(sizes, dtypes[2], 5)
    ema_update_(targets, sources, 0.9, shadows=shadows)
    for found, mean in itertools.chain(
        zip(targets, means, strict=True), zip(shadows or [], means if shadows else [], strict=True)
    ):
        # another order of the same three operations, and one rounding
        torch.testing.assert_close(
            found, mean.to(found.dtype), rtol=2 * torch.finfo(found.dtype).eps, atol=1e-7
        )


def test_one_call_takes_tensors_of_several_dtypes_and_sizes(walk: str) -> None:
    targets = [torch.randn(5000), torch.randn(7).bfloat16(), torch.randn(2, 3), torch.randn(70, 70).half()]
    sources = [torch.randn_like(x).to(d) for x, d in zip(targets, (*HALVES, *HALVES), strict=True)]
    expected = [x.clone() for x in targets]
    ema_update_ref_(expected, sources, 0.5)
    ema_update_(targets, sources, 0.5)
    for found, gold in zip(targets, expected, strict=True):
        torch.testing.assert_close(found, gold)


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_at_its_ends_a_decay_copies_and_keeps_every_bit(decay: float, walk: str) -> None:
    targets, sources = tensors([100, 5000], torch.float32, 0), tensors([100, 5000], torch.float32, 1)
    before = [x.clone() for x in targets]
    ema_update_(targets, sources, decay)
    expected = {0.0: sources, 1.0: before}.get(decay)
    assert expected is None or all(torch.equal(x, y) for x, y in zip(targets, expected, strict=True))


def test_a_decay_of_one_element_is_that_number(walk: str) -> None:
    found = [tensors([50], torch.float32, 0) for _ in range(2)]
    sources = tensors([50], torch.float32, 1)
    ema_update_(found[0], sources, 0.75)
    ema_update_(found[1], sources, torch.tensor([0.75]))
    assert torch.equal(found[0][0], found[1][0])


def test_dense_tensors_of_any_strides_are_averaged_in_place(walk: str) -> None:
    target = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    for source in (
        torch.randn_like(target),
        torch.randn(3, 4, 5, 6),
        torch.randn(1, 4, 1, 6).expand(3, 4, 5, 6),
    ):
        expected = torch.lerp(target, source, 0.25)
        ema_update_([target], [source], 0.75)
        torch.testing.assert_close(target, expected)


def test_parts_of_a_tensor_at_odd_addresses_are_averaged_and_nothing_beside_them(walk: str) -> None:
    for dtype in ALL:
        whole, source = torch.randn(9000).to(dtype), torch.randn(9000).to(dtype)
        before = whole.clone()
        ema_update_([whole[1:4098], whole[4100:8999]], [source[3:4100], source[4101:9000]], 0.5)
        expected = before.clone()
        ema_update_ref_([expected[1:4098], expected[4100:8999]], [source[3:4100], source[4101:9000]], 0.5)
        torch.testing.assert_close(whole, expected)
        untouched = [0, 4098, 4099, 8999]
        assert torch.equal(whole[untouched], before[untouched])


class TestBfloat16:
    def test_a_plain_teacher_stalls_and_a_stochastic_one_follows(self) -> None:
        """At decay 0.9999 an update is below half of a bfloat16's last place: all of them are lost."""
        source = torch.full((20_000,), 1.0)
        start = torch.full((20_000,), 0.5)
        steps, decay = (40 if INTERPRETED else 400), 0.9999
        plain, rounded, exact = start.bfloat16(), [start.bfloat16()], start.double()
        for step in range(steps):
            plain = torch.lerp(plain, source.bfloat16(), 1 - decay)
            ema_update_(rounded, [source], decay, rounding="stochastic", seed=step)
            exact = torch.lerp(exact, source.double(), 1 - decay)
        assert torch.equal(plain, start.bfloat16())
        moved = float(exact[0]) - 0.5
        # each step rounds with a variance of at most a quarter of a place squared
        error = 0.5 * 2**-8 * (steps / 20_000) ** 0.5
        assert abs(float(rounded[0].double().mean()) - float(exact[0])) < 5 * error + 1e-6 < moved

    def test_a_float32_average_follows_to_rounding_and_its_shadow_is_rounded_once(self) -> None:
        source, steps = [torch.full((4100,), 1.0).bfloat16()], 40 if INTERPRETED else 400
        mean, shadow = [torch.full((4100,), 0.5)], [torch.empty(4100, dtype=torch.bfloat16)]
        for _ in range(steps):
            ema_update_(mean, source, 0.9999, shadows=shadow)
        expected = 1 - 0.5 * 0.9999**steps
        torch.testing.assert_close(mean[0], torch.full((4100,), expected), rtol=0, atol=steps * 2**-24)
        # the interpreter cuts where a GPU rounds
        last_place = 2**-8 if INTERPRETED else 0.0
        torch.testing.assert_close(shadow[0], mean[0].bfloat16(), rtol=0, atol=last_place)

    def test_the_bits_are_those_of_the_reference_on_every_path(self, walk: str) -> None:
        sizes = [4096, 3, 5001]
        found, gold = ([x * 100 for x in tensors(sizes, torch.bfloat16, 0)] for _ in range(2))
        sources = tensors(sizes, torch.float32, 1)
        ema_update_(found, sources, 0.9999, rounding="stochastic", seed=-(2**61) + 7)
        ema_update_ref_(gold, sources, 0.9999, rounding="stochastic", seed=-(2**61) + 7)
        same = torch.cat([x == y for x, y in zip(found, gold, strict=True)])
        # a sum of two numbers may round otherwise in its last place, and then up in place of down
        assert same.double().mean() > 0.999

    def test_another_seed_rounds_otherwise_and_what_is_not_finite_stays(self) -> None:
        sources = [torch.tensor([torch.inf, torch.nan, 1.0] * 100)]
        found = [[torch.ones(300).bfloat16()] for _ in range(2)]
        for seed, target in enumerate(found):
            ema_update_(target, sources, 0.999, rounding="stochastic", seed=seed)
        of_inf, of_nan = found[0][0][0::3], found[0][0][1::3]
        assert of_inf.isinf().all() and of_nan.isnan().all()
        targets = [[torch.ones(300).bfloat16()] for _ in range(2)]
        for seed, target in enumerate(targets):
            ema_update_(target, [torch.full((300,), 0.5)], 0.999, rounding="stochastic", seed=seed)
        assert not torch.equal(targets[0][0], targets[1][0])


class TestTable:
    def test_it_is_made_once_as_long_as_no_tensor_moves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made, make = [], table._make
        monkeypatch.setattr(table, "_TABLES", type(table._TABLES)())
        monkeypatch.setattr(table, "_make", lambda lists: made.append(1) or make(lists))
        lists = [tensors([5, 6], torch.float32, seed) for seed in range(2)]
        for _ in range(3):
            table.table_of((*lists, []))
        assert len(made) == 1
        lists[0][1] = lists[0][1].clone()
        table.table_of((*lists, []))
        assert len(made) == 2

    def test_old_tables_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(table, "_TABLES", type(table._TABLES)())
        kept = [tensors([3], torch.float32, i) for i in range(table.MAX_TABLES + 5)]
        for i in range(len(kept)):
            table.table_of((kept[i], kept[i], []))
        assert len(table._TABLES) == table.MAX_TABLES
        kept.clear()
        assert not table._TABLES

    def test_another_tensor_in_the_place_of_one_that_went_has_a_table_of_its_own(self) -> None:
        for dtype in (torch.float32, torch.bfloat16) * 5:
            target, source = torch.zeros(64, dtype=dtype), torch.ones(64, dtype=dtype)
            ema_update_([target], [source], 0.5)
            assert torch.equal(target, torch.full((64,), 0.5, dtype=dtype))
            del target, source

    def test_a_tensor_that_was_turned_in_its_place_is_looked_at_anew(self) -> None:
        target, source = torch.zeros(3, 4), torch.arange(12.0).view(3, 4)
        ema_update_([target], [source], 0.5)
        target.t_()
        with pytest.raises(ValueError, match=r"sources\[0\] must be \[4, 3\], got \[3, 4\]"):
            ema_update_([target], [source], 0.5)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(sizes=st.lists(st.integers(0, 3 * table.CHUNK), min_size=1, max_size=5))
    def test_its_chunks_cover_each_element_once(self, sizes: list[int]) -> None:
        lists = [tensors(sizes, torch.float32, 0), tensors(sizes, torch.bfloat16, 1)]
        found = table.table_of((*lists, []))
        counts = [torch.zeros(n, dtype=torch.int64) for n in sizes]
        for number, first, elements in found.chunks.tolist():
            counts[number][first : first + elements] += 1
        for number, (kind, is_aligned, *addresses) in enumerate(found.tensors.tolist()):
            assert kind == 1 + (3 << table.DIGIT_BITS)
            places = [tensors[number].data_ptr() for tensors in lists]
            assert addresses == [*places, 0]
            assert is_aligned == all(place % 16 == 0 for place in places)
        assert all((count == 1).all() for count in counts)


def test_it_compiles_into_a_graph_that_updates_in_place() -> None:
    def step(targets: list[Tensor], sources: list[Tensor]) -> Tensor:
        ema_update_(targets, sources, 0.5)
        return targets[0] + 1

    torch._dynamo.reset()
    found, expected = ([torch.ones(5), torch.ones(3)] for _ in range(2))
    sources = [torch.zeros(5), torch.full((3,), 3.0)]
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(found, sources)
    assert torch.equal(result, step(expected, sources))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_parameters_that_want_gradients_are_averaged_without_any() -> None:
    model, teacher = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    ema_update_(list(teacher.parameters()), list(model.parameters()), 0.5)
    assert all(p.grad_fn is None and p.requires_grad for p in teacher.parameters())


def test_an_update_is_seen_by_what_was_saved_for_a_backward() -> None:
    target = torch.ones(3)
    loss = (torch.ones(3, requires_grad=True) * target).sum()
    ema_update_([target], [torch.zeros(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tensor_whose_memory_was_freed_is_refused() -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"sources\[0\] must hold its elements, got a tensor that was freed"):
        ema_update_([torch.ones(4)], [freed], 0.5)


def test_sources_may_share_memory() -> None:
    targets, source = [torch.zeros(3), torch.zeros(3)], torch.ones(3)
    ema_update_(targets, [source, source], 0.5)
    assert all(torch.equal(x, torch.full((3,), 0.5)) for x in targets)


def test_no_list_is_no_work() -> None:
    ema_update_([], [], 0.5)
    ema_update_([torch.ones(0)], [torch.ones(0)], 0.5)


ONE = torch.ones(4)
LONG = torch.ones(8)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"sources": []}, "sources must be 1 tensors like targets, got 0"),
    "shadows": ({"shadows": []}, "shadows must be 1 tensors like targets, got 0"),
    "shape": ({"sources": [torch.ones(5)]}, r"sources\[0\] must be \[4\], got \[5\]"),
    "dtype": ({"sources": [torch.ones(4).int()]}, r"sources\[0\] must be float32, .*, got torch.int32"),
    "twice": (
        {"targets": [ONE, ONE], "sources": [torch.ones(4), torch.ones(4)]},
        r"targets\[1\] must share no memory with targets\[0\], got tensors that overlap",
    ),
    "a source in its target": (
        {"targets": [ONE], "sources": [ONE]},
        r"targets\[0\] must share no memory with sources\[0\], got tensors that overlap",
    ),
    "a source over another's target": (
        {"targets": [ONE[:2], torch.ones(2)], "sources": [torch.ones(2), ONE[1:3]]},
        r"sources\[1\] must share no memory with targets\[0\], got tensors that overlap",
    ),
    "a shadow over a source behind a long one": (
        {
            "targets": [torch.ones(6), torch.ones(1)],
            "sources": [LONG[:6], LONG[1:2]],
            "shadows": [torch.ones(6), LONG[5:6]],
        },
        r"shadows\[1\] must share no memory with sources\[0\], got tensors that overlap",
    ),
    "layout": (
        {"targets": [torch.ones(8)[::2]]},
        r"targets\[0\] must be dense in strides \[2\], got \[2\]",
    ),
    "layout of a shadow": (
        {"targets": [torch.ones(2, 3)], "sources": [torch.ones(2, 3)], "shadows": [torch.ones(3, 2).T]},
        r"shadows\[0\] must be dense in strides \[3, 1\], got \[1, 2\]",
    ),
    "decay": ({"decay": 1.5}, "decay must be from 0 to 1, got 1.5"),
    "no decay": ({"decay": float("nan")}, "decay must be from 0 to 1, got nan"),
    "two decays": ({"decay": torch.ones(2)}, r"decay must be one number, got shape \[2\]"),
    "a stalled teacher": (
        {"targets": [ONE.bfloat16()], "decay": 0.99},
        "decay must be below 0.99 for targets in torch.bfloat16, got 0.99",
    ),
    "a stalled teacher in float16": (
        {"targets": [ONE.half()], "decay": torch.tensor(0.9999)},
        "decay must be below 0.999 for targets in torch.float16, got 0.9998",
    ),
    "rounding": ({"rounding": "up"}, r"rounding must be one of \(None, 'stochastic'\), got 'up'"),
    "rounding of float32": (
        {"rounding": "stochastic"},
        "rounding must be None for targets other than bfloat16, got them in {torch.float32}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case: str) -> None:
    changed, message = REFUSED[case]
    arguments: dict[str, Any] = {
        "targets": [torch.ones(4)],
        "sources": [torch.ones(4)],
        "decay": 0.5,
    } | changed
    with pytest.raises(ValueError, match=f"^ema_update_: {message}"):
        ema_update_(**arguments)


@pytest.mark.gpu
def test_a_cuda_graph_reads_the_decay_anew() -> None:
    targets, sources = [torch.zeros(5000, device="cuda")], [torch.ones(5000, device="cuda")]
    decay = torch.tensor(0.5, device="cuda")
    ema_update_(targets, sources, decay)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(targets, sources, decay)
    targets[0].zero_()
    decay.fill_(0.25)
    graph.replay()
    assert torch.equal(targets[0], torch.full((5000,), 0.75, device="cuda"))
