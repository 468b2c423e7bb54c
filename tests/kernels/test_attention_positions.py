"""Rotary, xPos and ALiBi against their formulas in complex numbers of double precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmkernels import alibi_slopes, rotary, xpos

EPS16, EPS32 = (torch.finfo(dtype).eps for dtype in (torch.float16, torch.float32))


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def as_pairs(x: Tensor, interleaved: bool) -> Tensor:
    """Pairs of dimensions as complex128."""
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.tensor_split(2, -1)
    return torch.complex(a.double(), b.double())


def frequencies(num_pairs: int, theta: float) -> Tensor:
    return torch.tensor([theta ** (-d / num_pairs) for d in range(num_pairs)], dtype=torch.float64)


def turned(x: Tensor, positions: Tensor, theta: float, interleaved: bool, dims: int) -> Tensor:
    """The definition of rotary."""
    angles = positions.double()[..., None, None] * frequencies(dims // 2, theta)
    pairs = as_pairs(x[..., :dims], interleaved) * torch.polar(torch.ones_like(angles), angles)
    parts = (
        torch.view_as_real(pairs).flatten(-2) if interleaved else torch.cat([pairs.real, pairs.imag], -1),
        x[..., dims:].double(),
    )
    return torch.cat(parts, -1)


class TestRotary:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("dims", [None, 2, 6])
    def test_is_a_complex_product(self, dtype: torch.dtype, interleaved: bool, dims: int | None) -> None:
        x = tensor(2, 5, 3, 10, dtype=dtype)
        for positions in (
            torch.arange(5),
            torch.tensor([[7, 0, 3, 3, -9], [90, 91, 92, 5, 6]]),
            tensor(2, 5, dtype=torch.float32) * 50,
        ):
            found = rotary(x, positions, theta=500.0, interleaved=interleaved, dims=dims)
            gold = turned(x, positions, 500.0, interleaved, dims or 10)
            assert found.dtype == dtype and found.shape == x.shape
            # an angle is as inexact as the float32 that holds it
            angle = 0 if dtype == torch.float64 else 2 * EPS32 * float(positions.abs().max())
            bound = (4 * torch.finfo(dtype).eps + angle) * gold.abs().max()
            assert (found.double() - gold).abs().max() <= bound

    def test_has_the_bits_of_llama_in_transformers(self) -> None:
        llama = pytest.importorskip("transformers.models.llama.modeling_llama")
        config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
        q, k = tensor(2, 9, 4, 16, dtype=torch.float32), tensor(2, 9, 2, 16, seed=1, dtype=torch.float32)
        positions = torch.stack([torch.arange(9), torch.arange(9) + 2000])
        waves = llama.LlamaRotaryEmbedding(config)(q, positions)
        for x, expected in zip((q, k), llama.apply_rotary_pos_emb(q, k, *waves, unsqueeze_dim=2), strict=True):
            assert torch.equal(rotary(x, positions), expected)

    @pytest.mark.parametrize("options", [{}, {"interleaved": True}, {"dims": 4}], ids=str)
    def test_turns_its_gradient_back(self, options: dict[str, Any]) -> None:
        x, d_out, places = tensor(2, 5, 3, 8).requires_grad_(), tensor(2, 5, 3, 8, seed=1), torch.arange(5)
        (dx,) = torch.autograd.grad(rotary(x, places, **options), x, d_out)
        assert_close(dx, rotary(d_out, -places, **options))

    def test_takes_any_strides(self) -> None:
        x = tensor(2, 3, 5, 16).transpose(1, 2)[..., ::2]
        assert torch.equal(rotary(x, torch.arange(5)), rotary(x.contiguous(), torch.arange(5)))


class TestXPos:
    @pytest.mark.parametrize("scale_base", [512.0, 16.0])
    def test_queries_and_keys_have_batches_heads_and_positions_of_their_own(self, scale_base: float) -> None:
        q, k, theta = tensor(1, 4, 6, 8), tensor(2, 7, 3, 8, seed=1), 500.0
        at_q, at_k = torch.tensor([[3.5, 4.0, 9.0, 11.25]]), torch.arange(14).view(2, 7)
        rows, cols = xpos(q, k, at_q, at_k, theta=theta, scale_base=scale_base)
        assert rows.shape == q.shape and cols.shape == k.shape
        # the middle lies between the first and the last position of all
        middle = (min(3.5, int(at_k.min())) + max(11.25, int(at_k.max()))) / 2
        zeta = torch.tensor([(d // 2 * 2 / 8 + 0.4) / 1.4 for d in range(8)], dtype=torch.float64)
        for x, found, at, sign in ((q, rows, at_q, 1), (k, cols, at_k, -1)):
            scale = zeta ** (sign * (at.double()[..., None, None] - middle) / scale_base)
            assert_close(found, scale * turned(x, at, theta, True, 8))

    def test_late_positions_do_not_overflow(self) -> None:
        """Half precision ends at 3.5^8.8; of positions as they come, it would have to hold 3.5^23."""
        q, k = tensor(1, 6, 1, 64, dtype=torch.float16), tensor(1, 6, 1, 64, seed=1, dtype=torch.float16)
        early = torch.arange(0, 2400, 400)
        for found, expected in zip(xpos(q, k, early + 10_000, early + 10_000), xpos(q, k, early, early)):
            sizes = as_pairs(found, True).abs()
            # each number is rounded once, by half an eps
            assert_close(sizes, as_pairs(expected, True).abs(), rtol=EPS16, atol=0)

    def test_has_the_gradient_of_its_formula(self) -> None:
        q, k, at = tensor(1, 3, 2, 4).requires_grad_(), tensor(2, 3, 1, 4).requires_grad_(), torch.arange(3)
        assert torch.autograd.gradcheck(lambda q, k: xpos(q, k, at, at, scale_base=4.0), (q, k))


@pytest.mark.parametrize("shape", [(2, 0, 3, 8), (0, 4, 3, 8)], ids=str)
def test_nothing_stays_nothing(shape: tuple[int, ...]) -> None:
    x, at = torch.ones(shape), torch.arange(shape[1]).expand(shape[:2])
    assert all(y.shape == shape for y in (rotary(x, at), *xpos(x, x, at, at)))


COMPILED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rotary": rotary,
    "interleaved": lambda x, at: rotary(x, at, interleaved=True, dims=4),
    "xpos": lambda x, at: torch.cat(xpos(x, 2 * x, at, at)),
    "alibi_slopes": lambda x, at: x * alibi_slopes(3, device=x.device)[:, None],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole_it_is_the_same(name: str) -> None:
    x, at = tensor(2, 5, 3, 8).requires_grad_(), torch.arange(5)
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, at), COMPILED[name](x, at)
    assert_close(found, expected)
    d_out = torch.randn_like(expected)
    assert_close(torch.autograd.grad(found, x, d_out), torch.autograd.grad(expected, x, d_out))


class TestAlibiSlopes:
    @pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 12, 16, 20, 25, 32, 33, 71])
    def test_follow_the_papers_rule(self, num_heads: int) -> None:
        def rule(n: int) -> list[float]:
            below = 1
            while 2 * below <= n:
                below *= 2
            if n == below:
                return [(2 ** (-8 / n)) ** h for h in range(1, n + 1)]
            return rule(below) + rule(2 * below)[::2][: n - below]

        found = alibi_slopes(num_heads)
        assert found.dtype == torch.float32 and found.shape == (num_heads,)
        assert_close(found, torch.tensor(rule(num_heads)))
