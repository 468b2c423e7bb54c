"""Sums over equal labels: the targets of a batch in which several rows and columns are each other's positives."""

import torch
from torch import Tensor


def first_match(labels: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """For each label `[M]` the first position of an equal one `among` `[N]`, -1 if none, and their number."""
    order = among.argsort(stable=True)
    ordered = among[order].contiguous()
    first = torch.searchsorted(ordered, labels.contiguous())
    count = torch.searchsorted(ordered, labels.contiguous(), right=True) - first
    if not len(among):
        return torch.full_like(count, -1), count
    return torch.where(count > 0, order[first.clamp(max=len(among) - 1)], -1), count


@torch.library.custom_op("mmkernels::label_sums", mutates_args=())
def label_sums(x: Tensor, of: Tensor, labels: Tensor) -> Tensor:
    """`[M, D]`: for each of `labels` `[M]` the sum of the rows of `x` `[N, D]` whose label, in `of` `[N]`, equals it.

    By a sort and sums of runs, so that reruns are bit-identical and nothing waits for a GPU. Its gradient is
    the same function with the labels' places exchanged.
    """
    order = of.argsort(stable=True)
    ordered = of[order]
    if not len(of) or not len(labels):
        return x.new_zeros(len(labels), x.shape[1])
    starts = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=starts[1:])
    run = starts.cumsum(0) - 1  # [N] the run that each ordered row is in
    lengths = torch.zeros_like(run).index_add_(0, run, torch.ones_like(run))  # integers: any order is exact
    sums = torch.segment_reduce(x[order].contiguous(), "sum", lengths=lengths, axis=0, unsafe=True)
    place = torch.searchsorted(ordered, labels.contiguous()).clamp(max=len(of) - 1)
    return torch.where((ordered[place] == labels)[:, None], sums[run[place]], 0.0)


@label_sums.register_fake
def _(x: Tensor, of: Tensor, labels: Tensor) -> Tensor:
    return x.new_empty(labels.shape[0], x.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    _, of, labels = inputs
    ctx.save_for_backward(of, labels)


def _backward(ctx, grad: Tensor):
    of, labels = ctx.saved_tensors
    return label_sums(grad.contiguous(), labels, of), None, None


label_sums.register_autograd(_backward, setup_context=_setup_context)
