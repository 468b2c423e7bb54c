"""What attention promises beyond the contract that every op obeys."""

import math
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.contract import check
from bench.ops.attention import INTERVALS, PLAIN
from bench.spec import OpSpec, Shape
from mmkernels import QKNorm, attention, attention_ref, masks, native
from mmkernels._device import INTERPRETED
from mmkernels._philox import drop_, kept
from mmkernels.attention import blockwise
from mmkernels.attention.problem import Problem
from tests.kernels.plants import OPS
from tests.kernels.recorded import Operations


def operands(
    batch: int = 2, num_queries: int = 9, num_keys: int = 20, heads: tuple[int, int] = (4, 2), width: int = 16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]))
    return [torch.randn(batch, n, h, width, generator=generator).requires_grad_() for n, h in sizes]


# the interpreter takes milliseconds a tile
NUM_SEEDS = 60 if INTERPRETED else 400
ours = partial(attention, backend="mmkernels")


class TestRowsThatSeeNothing:
    q, k, v = operands()
    mask = masks.lengths(torch.tensor([0, 20]), 9, 20)

    def test_are_zero_and_so_are_their_gradients(self) -> None:
        out, lse = ours(self.q, self.k, self.v, mask=self.mask, return_lse=True)
        assert not out[0].any() and out[1].all()
        assert (lse[0] == -torch.inf).all() and lse[1].isfinite().all()
        for dx in torch.autograd.grad(out.sum(), (self.q, self.k, self.v)):
            assert not dx[0].any() and dx[1].isfinite().all()

    def test_are_the_mean_of_all_values_where_they_are_asked_to_be(self) -> None:
        out = ours(self.q, self.k, self.v, mask=self.mask, empty_rows="uniform")
        mean = self.v[0].mean(0).repeat_interleave(2, 0).expand(9, -1, -1)
        torch.testing.assert_close(out[0], mean)
        dq, dv = torch.autograd.grad(out[0].sum(), (self.q, self.v))
        assert not dq.any()
        torch.testing.assert_close(dv[0], torch.full_like(dv[0], 9 * 2 / 20))

    def test_are_of_no_dropout_and_of_rows_whose_keys_are_all_padding(self) -> None:
        keys = torch.arange(20)[None] % 7 > 4
        mask = masks.causal(9, 20) & masks.key_padding(torch.cat([keys, torch.zeros_like(keys)]), 9)
        for empty_rows in ("zero", "uniform"):
            out, expected = (
                f(self.q, self.k, self.v, mask=mask, dropout_p=0.4, seed=torch.tensor(5), empty_rows=empty_rows)
                for f in (ours, attention_ref)
            )
            torch.testing.assert_close(out, expected)
            assert bool(out[1].any()) == (empty_rows == "uniform")

    def test_mask_or_none_a_call_without_keys_gives_zeros(self) -> None:
        q, k, v = operands(num_keys=0)
        out = ours(q, k, v)
        assert out.shape == q.shape and not out.any()
        assert all(not dx.any() for dx in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7)], ids=str)
def test_an_empty_batch_has_gradients_of_its_shape(sizes: tuple[int, int, int]) -> None:
    q, k, v = operands(*sizes)
    out = ours(q, k, v)
    assert out.shape == q.shape
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(dx.shape == x.shape and not dx.any() for dx, x in zip(grads, (q, k, v), strict=True))


def test_a_nan_reaches_every_row_that_sees_it() -> None:
    q, k, v = (x.detach() for x in operands(batch=1))
    v[0, 12, :, 3] = torch.nan
    out = ours(q, k, v, mask=masks.causal(9, 20))
    seen = torch.arange(9) + 11 >= 12
    assert out[0, seen, :, 3].isnan().all()
    k[0, 12] = torch.nan
    assert ours(q, k, v, mask=masks.causal(9, 20))[0, seen].isnan().all()


def test_queries_of_a_batch_of_one_serve_every_batch() -> None:
    q, k, v = operands()
    shared = q[:1].detach().requires_grad_()
    out, repeated = ours(shared, k, v), shared.expand(2, -1, -1, -1).detach().requires_grad_()
    expected = ours(repeated, k, v)
    assert torch.equal(out, expected)
    (dq,), (of_each,) = (torch.autograd.grad(x.sum(), y) for x, y in ((out, shared), (expected, repeated)))
    torch.testing.assert_close(dq, of_each.sum(0, keepdim=True))


def test_autocast_brings_operands_of_different_dtypes_to_its_own() -> None:
    q, k, v = (torch.randn(2, 5, 3, 32) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v.bfloat16())
        with pytest.raises(ValueError, match="attention: v must have the dtype of q"):
            attention(q, k, v.double())
    assert torch.equal(out, attention(*(x.bfloat16() for x in (q, k, v))))


def test_a_gate_of_zero_still_has_a_gradient() -> None:
    q, k, v = operands()
    gate = torch.zeros(1, requires_grad=True)
    out = ours(q, k, v, gate=gate)
    assert not out.any()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), gate)[0], ours(q, k, v).sum().reshape(1))


def test_a_norm_of_queries_and_keys_is_transformers() -> None:
    q, k, v = operands()
    norm = QKNorm(torch.rand(16) + 0.5, torch.rand(16) + 0.5, 1e-5)

    def by_hand(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    expected = ours(by_hand(q, norm.q_weight), by_hand(k, norm.k_weight), v)
    torch.testing.assert_close(ours(q, k, v, qk_norm=norm), expected)


@pytest.mark.parametrize("width", [32, 40, 72, 80, 96, 160, 256])
def test_any_head_dimension_is_as_near_as_the_reference(width: int) -> None:
    shape = {"B": 1, "H": 2, "Hkv": 1, "Lq": 18, "Lk": 35, "K": width}
    for spec in (PLAIN, INTERVALS):
        check(spec, shape, "random", torch.float32, seeds=range(2))


def test_alibi_is_relative_to_the_last_key() -> None:
    q, k, v = operands(batch=1, heads=(2, 2))
    slopes = torch.tensor([0.5, 0.25])
    distance = (torch.arange(9)[:, None] + 11 - torch.arange(20)).abs()
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=-slopes[:, None, None] * distance
    ).transpose(1, 2)
    torch.testing.assert_close(ours(q, k, v, alibi_slopes=slopes), expected)


class TestDropout:
    q, k, v = operands(num_queries=40, num_keys=50)

    def test_the_same_seed_drops_the_same_weights(self) -> None:
        one, other, another = (ours(self.q, self.k, self.v, dropout_p=0.5, seed=s) for s in (3, 3, 4))
        assert torch.equal(one, other) and not torch.equal(one, another)

    def test_a_seed_is_drawn_from_torchs_generator(self) -> None:
        found = []
        for _ in range(2):
            torch.manual_seed(7)
            found.append([ours(self.q, self.k, self.v, dropout_p=0.5) for _ in range(2)])
        assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[0][1])

    def test_the_mean_over_seeds_is_attention_without_it(self) -> None:
        q, k, v = (x.detach() for x in operands(batch=1, num_queries=5, num_keys=6))
        draws = torch.stack([ours(q, k, v, dropout_p=0.3, seed=seed) for seed in range(NUM_SEEDS)])
        off = (draws.mean(0) - ours(q, k, v)) / (draws.std(0) / math.sqrt(NUM_SEEDS))
        assert off.abs().max() < 5

    @pytest.mark.parametrize("cols", [(0, 1), (0, 64), (3, 70), (1, 2), (5, 5)], ids=str)
    def test_any_part_of_the_weights_has_the_bits_of_the_whole(self, path: str, cols: tuple[int, int]) -> None:
        heads = torch.arange(6).view(2, 3)
        weights = torch.rand(2, 3, 7, 80)
        seed = torch.tensor(-(2**61) + 12345)
        whole = drop_(weights.clone(), seed, 0.4, heads, slice(2, 9), slice(0, 80))
        part = weights[..., slice(*cols)].contiguous()
        drop_(part, seed, 0.4, heads, slice(2, 9), slice(*cols))
        assert torch.equal(part, whole[..., slice(*cols)])
        keep = kept(seed, 0.4, heads, torch.arange(2, 9), torch.arange(80))
        assert torch.equal(whole == 0, ~keep)


def test_the_row_of_the_launch_table_is_a_function_of_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, found = import_module("mmkernels.attention.kernel"), []
    monkeypatch.setattr(kernel, "launch_config", lambda table, name, q: found.append(name))
    for num_queries, width, dtype in ((32, 64, torch.half), (33, 64, torch.half), (32, 72, torch.half), (32, 64, None)):
        q, k = (torch.empty(2, length, 12, width, dtype=dtype) for length in (num_queries, 257))
        for seed in (None, torch.tensor(3)):
            kernel._config_of("fwd", Problem(q, ((k, k),), (), None, None, None, seed, 1.0, 0.0))
    assert found == [
        "fwd_few_64", "fwd_rich_few_64", "fwd_64", "fwd_rich_64", "fwd_128", "fwd_rich_128", "fwd_64", "fwd_rich_64",
    ]  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="of the blockwise path")
@pytest.mark.parametrize("kind", ["causal", "documents", "media", "dropout", "padded", "dense"])
def test_nothing_of_the_size_of_the_weights_is_ever_made(kind: str) -> None:
    length = 2048
    q, k, v = operands(1, length, length, (2, 2), 8)
    options: dict[str, Any] = {
        "causal": {"mask": masks.causal(length)},
        "documents": {"mask": masks.documents((torch.arange(length) // 500)[None])},
        "media": {"mask": masks.media(torch.arange(length)[None] % 512 == 0, 4, length // 4)},
        "dropout": {"dropout_p": 0.1, "seed": 0},
        "padded": {"mask": masks.key_padding(torch.arange(length)[None] % 3 > 0, length)},
        "dense": {"mask": masks.dense((torch.arange(length)[None] % 3 > 0)[:, None])},
    }[kind]
    with Operations() as seen:
        out: Any = ours(q, k, v, **options)
        torch.autograd.grad(out.sum(), (q, k, v))
    assert seen.largest <= length * length // 2


@pytest.mark.skipif(INTERPRETED, reason="of the blockwise path")
def test_tiles_that_nobody_sees_are_skipped(monkeypatch: pytest.MonkeyPatch, aten_steps: None) -> None:
    done = []
    forward = blockwise._fused_forward
    monkeypatch.setattr(
        blockwise, "_fused_forward", lambda problem, piece: done.append(piece) or forward(problem, piece)
    )
    q, k, v = operands(1, 512, 1024, (1, 1), 8)
    ours(q, k, v, mask=masks.media(torch.arange(512)[None] % 128 == 0, 4, 256))
    assert sum((p.rows.stop - p.rows.start) * (p.cols.stop - p.cols.start) for p in done) == 512 * 256
    assert {piece.kind for piece in done} == {"full"}


@pytest.mark.skipif(INTERPRETED, reason="of the blockwise path")
def test_padding_is_skipped_where_it_is_long_and_masked_where_it_is_short(
    monkeypatch: pytest.MonkeyPatch, aten_steps: None
) -> None:
    done = []
    forward = blockwise._fused_forward
    monkeypatch.setattr(
        blockwise, "_fused_forward", lambda problem, piece: done.append(piece) or forward(problem, piece)
    )
    q, k, v = operands(2, 512, 1024, (1, 1), 8)
    places = torch.arange(1024)
    keys = torch.stack([(places >= 100) & (places < 900), (places < 300) | (places >= 500) & (places % 100 > 0)])
    ours(q, k, v, mask=masks.key_padding(keys, 512))
    assert [(piece.batch.start, piece.cols.start, piece.cols.stop, piece.kind) for piece in done] == [
        (0, 100, 900, "full"), (1, 0, 300, "full"), (1, 501, 1024, "padded"),
    ]  # fmt: skip
    done.clear()
    ours(q, k, v, mask=masks.causal(512, 1024) & masks.key_padding(keys[:1].logical_not(), 512))
    # 0 to 100, and from 900 on causally
    assert {(p.cols.start, p.cols.stop, p.kind) for p in done} == {(0, 100, "full"), (900, 1024, "causal")}


@pytest.mark.skipif(INTERPRETED or not native.AVAILABLE, reason="of the native step")
def test_the_native_step_skips_tiles_that_nobody_sees() -> None:
    """What lies there may be anything: it is not read."""
    q, k, v = (x.detach() for x in operands(1, 512, 1024, (2, 1), 8))
    hidden = torch.arange(1024) >= 512
    for mask, unseen in (
        (masks.lengths(torch.tensor([512]), 512, 1024), hidden),
        (masks.key_padding(~hidden[None], 512), hidden),
        (masks.causal(512, 1024) & masks.key_padding(hidden[None], 512), ~hidden),
    ):
        clean, dirty = (
            [x.masked_fill(unseen[None, :, None, None], value).requires_grad_() for x in (k, v)]
            for value in (0, torch.nan)
        )
        found = []
        for keys, values in (clean, dirty):
            out = ours(q, keys, values, mask=mask)
            found.append([out, *torch.autograd.grad(out.sum(), (keys, values))])
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="of the blockwise path")
@pytest.mark.parametrize("spec", OPS["attention"].checks, ids=lambda check: check[0].name)
def test_the_contract_holds_without_the_native_step(spec: tuple[OpSpec, Shape], aten_steps: None) -> None:
    check(*spec, "random", torch.bfloat16, seeds=range(4))


def test_activation_checkpointing_changes_no_bit() -> None:
    q, k, v = operands()
    plain, again = (
        torch.autograd.grad(call().sum(), (q, k, v))
        for call in (
            lambda: ours(q, k, v, dropout_p=0.3, seed=5),
            lambda: checkpoint(lambda *x: ours(*x, dropout_p=0.3, seed=5), q, k, v, use_reentrant=False),
        )
    )
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))
