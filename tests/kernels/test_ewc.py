"""What fisher_accumulate_ and ewc_penalty promise beyond the contract that every op obeys."""

import itertools

import pytest
import torch
from torch import Tensor

from mmkernels import ewc_penalty, ewc_penalty_ref, fisher_accumulate_
from mmkernels.multi_tensor.table import CHUNK
from tests.kernels.tensor_lists import ALL, tensors

SIZES = [1, CHUNK, 300, 0, 4103]


class TestFisher:
    def test_gradients_of_other_strides_and_of_float64_are_taken(self, path: str) -> None:
        fisher, grad = torch.zeros(4, 6), torch.randn(6, 4).T
        fisher_accumulate_([fisher], [grad])
        torch.testing.assert_close(fisher, grad.square())
        fisher_accumulate_([fisher], [torch.ones(1, 6, dtype=torch.float64).expand(4, 6)])
        torch.testing.assert_close(fisher, grad.square() + 1)


Problem = tuple[list[Tensor], list[Tensor], list[Tensor]]


def problem(dtypes: tuple[torch.dtype, ...], sizes: list[int] = SIZES) -> Problem:
    params, anchors, fishers = (tensors(sizes, dtype, i) for i, dtype in enumerate(dtypes))
    return [x.requires_grad_() for x in params], anchors, [x.square() for x in fishers]


class TestPenalty:
    @pytest.mark.parametrize("dtypes", itertools.product(ALL, repeat=3), ids=str)
    def test_value_and_gradients_of_any_dtypes_are_those_of_float64(
        self, dtypes: tuple[torch.dtype, ...], path: str
    ) -> None:
        lists = problem(dtypes)
        params, anchors, fishers = ([x.detach().double() for x in part] for part in lists)
        params = [x.requires_grad_() for x in params]
        found, gold = ewc_penalty(*lists, 3.0), ewc_penalty_ref(params, anchors, fishers, 3.0)
        torch.testing.assert_close(found.double(), gold, rtol=1e-6, atol=0)
        assert found.dtype == torch.float32
        grads = torch.autograd.grad(2 * found, lists[0])
        for x, y in zip(grads, torch.autograd.grad(2 * gold, params), strict=True):
            # the interpreter cuts where a GPU rounds
            eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny
            torch.testing.assert_close(x.double(), y, rtol=2 * eps, atol=tiny)
        assert [x.dtype for x in grads] == [x.dtype for x in lists[0]]

    def test_what_needs_no_gradient_gets_none(self, path: str) -> None:
        params, anchors, fishers = problem((torch.float32,) * 3)
        for i in (0, 2, 4):
            params[i].requires_grad_(False)
        ewc_penalty(params, anchors, fishers, 0.5).backward()
        assert [x.grad is None for x in params] == [True, False, True, False, True]
        expected = 0.5 * fishers[1] * (params[1].detach() - anchors[1])
        torch.testing.assert_close(params[1].grad, expected)
        frozen = [x.detach() for x in params]
        assert not ewc_penalty(frozen, anchors, fishers, 0.5).requires_grad

    def test_anchors_and_fishers_are_constants(self, path: str) -> None:
        param, *constants = (torch.randn(4, 6, requires_grad=True) for _ in range(3))
        # the second is copied into the first's strides
        ewc_penalty([param], [constants[0] * 1], [constants[1].T.contiguous().T], 1.0).backward()
        assert param.grad is not None and all(x.grad is None for x in constants)

    def test_any_strides_are_read_and_gradients_follow(self, path: str) -> None:
        whole = torch.randn(2, 6, 8, requires_grad=True)
        anchors = [torch.randn(8, 6).T, torch.randn(1, 4).expand(6, 4)]
        fishers = [torch.rand(6, 8), torch.rand(6, 8)[:, ::2]]

        def params() -> list[Tensor]:
            return [whole[0], whole[1, :, ::2]]

        gold = torch.autograd.grad(ewc_penalty_ref(params(), anchors, fishers, 2.0), whole)
        found = torch.autograd.grad(ewc_penalty(params(), anchors, fishers, 2.0), whole)
        torch.testing.assert_close(found, gold)

    def test_the_same_parameter_in_two_places_counts_twice(self, path: str) -> None:
        param = torch.ones(5, requires_grad=True)
        value = ewc_penalty([param, param], [torch.zeros(5)] * 2, [torch.ones(5)] * 2, 1.0)
        assert torch.equal(torch.autograd.grad(value, param)[0], torch.full((5,), 2.0))

    def test_no_strength_and_no_list_are_no_penalty(self, path: str) -> None:
        params, anchors, fishers = problem((torch.float32,) * 3)
        value = ewc_penalty(params, anchors, fishers, 0.0)
        assert value == 0 and not any(x.any() for x in torch.autograd.grad(value, params))
        assert ewc_penalty([], [], [], 1.0) == 0
        empty = torch.ones(0, requires_grad=True)
        value = ewc_penalty([empty], [torch.ones(0)], [torch.ones(0)], 1.0)
        assert torch.autograd.grad(value, empty)[0].shape == (0,)

    def test_a_step_before_its_backward_is_an_error(self) -> None:
        params, anchors, fishers = problem((torch.float32,) * 3)
        value = ewc_penalty(params, anchors, fishers, 1.0)
        with torch.no_grad():
            params[1].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
