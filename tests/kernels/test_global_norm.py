"""What global_norm and clip_ promise beyond the contract that every op obeys."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import clip_, global_norm
from mmkernels.multi_tensor.table import CHUNK
from tests.kernels.tensor_lists import ALL, HALVES, tensors

SIZES = [1, CHUNK, 300, 0, 4103]


def norm64(lists: list[Tensor]) -> float:
    return float(sum(x.double().square().sum() for x in lists)) ** 0.5


class TestNorm:
    def test_one_call_takes_tensors_of_several_dtypes(self, path: str) -> None:
        mixed = [x.to(dtype) for x, dtype in zip(tensors(SIZES, torch.float32, 0), (*ALL, *HALVES))]
        found = global_norm(mixed)
        assert found.shape == () and found.dtype == torch.float32
        assert float(found) == pytest.approx(norm64(mixed), rel=1e-6)
        found = global_norm([*mixed, torch.ones(7, dtype=torch.float64)])
        assert found.dtype == torch.float64
        assert float(found) == pytest.approx(norm64([*mixed, torch.ones(7)]), rel=1e-12)

    @pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-25, 3e-22, 1e-19, 1.0, 1e19, 1e25, 3e36])
    def test_squares_neither_overflow_nor_vanish(self, size: float, path: str) -> None:
        x = [torch.full((n,), size) for n in (5000, 3)]
        assert float(global_norm(x)) == pytest.approx(float(x[0][0]) * 5003**0.5, rel=1e-6, abs=1e-45)
        if size in (1e-25, 1e25):
            assert float(torch.nn.utils.get_total_norm(x)) in (0.0, math.inf)

    def test_the_largest_of_a_dtype_and_what_stands_beside_it_count(self, path: str) -> None:
        for dtype in ALL:
            largest = torch.finfo(dtype).max
            x = [torch.tensor([largest / 2, 1.0]).to(dtype), torch.full((CHUNK,), largest / 256).to(dtype)]
            assert float(global_norm(x)) == pytest.approx(norm64(x), rel=1e-6)
        assert global_norm([torch.full((4,), torch.finfo(torch.float32).max)]) == torch.inf

    @pytest.mark.parametrize(
        ("values", "expected"),
        [((torch.nan, 1.0), torch.nan), ((torch.inf, 1.0), torch.inf), ((-torch.inf, torch.nan), torch.nan)],
    )
    def test_what_is_not_finite_is_passed_on(self, values: tuple[float, float], expected: float, path: str) -> None:
        for dtype in ALL:
            x = tensors([CHUNK, 5000, 7], dtype, 0)
            x[0][5], x[1][4999] = values
            torch.testing.assert_close(global_norm(x), torch.tensor(expected), equal_nan=True)

    def test_any_strides_are_read(self, path: str) -> None:
        x = torch.randn(6, 8)
        views = [x.T, x[:, ::2], x[1:, 3:], x[:1].expand(5, 8), x.view(1, 6, 2, 4).permute(0, 3, 1, 2)]
        assert float(global_norm(views)) == pytest.approx(norm64(views), rel=1e-6)

    def test_no_tensor_and_none_with_elements_have_no_norm(self, path: str) -> None:
        assert global_norm([]) == 0 and global_norm([torch.ones(0), torch.ones(3, 0)]) == 0

    def test_parameters_have_a_norm_without_a_gradient(self) -> None:
        found = global_norm(list(torch.nn.Linear(3, 4).parameters()))
        assert not found.requires_grad

    def test_the_same_tensor_counts_twice(self, path: str) -> None:
        x = torch.full((4,), 2.0)
        assert float(global_norm([x, x])) == pytest.approx(32**0.5)


class TestClip:
    @pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9, math.inf])
    @pytest.mark.parametrize("special", [None, torch.nan, torch.inf])
    def test_it_does_what_torch_does_to_gradients(self, max_norm: float, special: float | None, path: str) -> None:
        grads = tensors(SIZES, torch.float32, 3)
        if special is not None:
            grads[2][7] = special
        params = [torch.nn.Parameter(torch.empty(n)) for n in SIZES]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=True)
        found = clip_(grads, max_norm)
        torch.testing.assert_close(found, expected, equal_nan=True)
        for grad, param in zip(grads, params, strict=True):
            torch.testing.assert_close(grad, param.grad, equal_nan=True)

    def test_below_the_bound_no_bit_is_touched(self, path: str) -> None:
        # a multiplication would make this NaN a quiet one
        bits = torch.full((5000,), 0x7F800001, dtype=torch.int32)
        for x in (bits.clone().view(torch.float32), bits.clone().view(torch.bfloat16)):
            before = x.view(torch.int32).clone()
            clip_([x], 1.0, norm=0.25)
            assert torch.equal(x.view(torch.int32), before)

    @pytest.mark.parametrize("norm", [4.0, torch.tensor(4.0), torch.tensor([4.0], dtype=torch.float64)])
    def test_a_norm_of_more_than_these_tensors_is_taken_as_it_is(self, norm: Any, path: str) -> None:
        x = [torch.ones(5), torch.ones(3, dtype=torch.bfloat16)]
        found = clip_(x, 2.0, norm=norm)
        assert found.shape == () and found == 4 and found.dtype == torch.float32
        torch.testing.assert_close(x[0], torch.full((5,), 2 / (4 + 1e-6)))
        x = [torch.ones(5, dtype=torch.float64)]
        assert clip_(x, 2.0, norm=norm).dtype == torch.float64
        torch.testing.assert_close(x[0], torch.full((5,), 2 / (4 + 1e-6), dtype=torch.float64))

    def test_no_tensor_is_no_work(self, path: str) -> None:
        assert clip_([], 1.0) == 0 and clip_([], 1.0, norm=3.0) == 3
        assert clip_([torch.ones(0)], 1.0) == 0

    def test_a_norm_that_is_not_finite_is_an_error_where_asked_for_and_nothing_is_written(self) -> None:
        x = torch.tensor([1.0, torch.nan])
        with pytest.raises(ValueError, match=r"^clip_: tensors must have a finite norm, got nan"):
            clip_([x], 0.1, error_if_nonfinite=True)
        assert x[0] == 1
        assert clip_([x[:1]], 0.5, error_if_nonfinite=True) == 1

    def test_a_table_of_what_was_only_read_is_not_one_of_what_is_written(self) -> None:
        x = torch.ones(4)
        global_norm([x, x])
        with pytest.raises(ValueError, match=r"tensors\[1\] must share no memory with tensors\[0\]"):
            clip_([x, x], 1.0)
