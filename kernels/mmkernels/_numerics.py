"""Numerics that the blockwise and the Triton paths share."""

import torch
from torch import Tensor

from mmkernels._checks import accumulator


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype that its products are accumulated in, contiguous."""
    return x.to(accumulator(x.dtype)).contiguous()


def log_sum_exp(largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """`largest + log(total)`, and what rounding it has lost (zero for an empty sum).

    At logits near 100 the loss of half an ulp would move every probability of a row by 4e-6, thirty times
    epsilon.
    """
    largest, log_total = largest.double(), total.double().log()
    exact = largest + log_total
    lse = exact.to(total.dtype)
    # what float64 itself has lost: an exact two-sum
    of_log = exact - largest
    lost = (largest - (exact - of_log)) + (log_total - of_log)
    return lse, ((exact - lse) + lost).to(total.dtype).nan_to_num_(0.0, 0.0, 0.0)


def combine_sums(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp, -inf if of nothing, and its rounding error, from partial (max, sum) along dimension 0."""
    if not len(maxima):
        return log_sum_exp(maxima.new_full(maxima.shape[1:], -torch.inf), sums.sum(0))
    largest = maxima.amax(0)
    return log_sum_exp(largest, sums.mul_(maxima.sub_(largest).exp_()).sum(0))
