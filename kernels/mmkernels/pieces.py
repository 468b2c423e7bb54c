"""What losses over several processes are composed of: checks of inputs, a block's statistics and gradients, the
way from statistics to a loss, and what a block takes of memory and time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._autograd import first_order, is_transforming, untransformed
from mmkernels._checks import accumulator, require
from mmkernels._cost import Cost, contrastive_cost
from mmkernels._gemm import CALLS_ONEDNN, matmul_nt
from mmkernels._launch import chunk_rows
from mmkernels._numerics import log_sum_exp
from mmkernels.contrastive.blockwise import TILE
from mmkernels.contrastive.labels import first_match, label_sums
from mmkernels.contrastive.loss import LinearMeans, Match, Options, check_unseen, checked_inputs, pair_losses, reduce
from mmkernels.contrastive.op import STORED_LOGITS, broken_claim
from mmkernels.contrastive.problem import MAX_LOGITS, ContrastiveStats, mean_cosine, poisoned
from mmkernels.contrastive.problem import Problem as ContrastiveProblem
from mmkernels.sigmoid.op import checked_operands as checked_sigmoid_operands
from mmkernels.sigmoid.op import finished as finished_sigmoid
from mmkernels.token_contrastive.loss import cross_entropy as token_cross_entropy
from mmkernels.token_contrastive.op import check_labels as check_token_labels
from mmkernels.token_contrastive.op import check_masks as check_token_masks
from mmkernels.token_contrastive.op import operands as token_operands
from mmkernels.token_contrastive.problem import Problem as TokenProblem
from mmkernels.token_contrastive.problem import TokenContrastiveStats, label_counts
from mmkernels.token_contrastive.problem import mean_cosine as token_mean_cosine

__all__ = [
    "CALLS_ONEDNN",
    "ContrastiveProblem",
    "ContrastiveStats",
    "Cost",
    "LinearMeans",
    "Match",
    "Options",
    "TokenContrastiveStats",
    "TokenProblem",
    "accumulator",
    "broken_claim",
    "check_token_labels",
    "check_token_masks",
    "check_unseen",
    "checked_inputs",
    "checked_sigmoid_operands",
    "contrastive_block",
    "contrastive_block_grads",
    "contrastive_bytes",
    "contrastive_cost",
    "first_match",
    "first_order",
    "is_transforming",
    "keeps_logits",
    "label_counts",
    "label_sums",
    "log_sum_exp",
    "matmul_nt",
    "mean_cosine",
    "pair_losses",
    "poisoned",
    "reduce",
    "require",
    "sigmoid_block",
    "token_block",
    "token_block_grads",
    "token_cross_entropy",
    "token_mean_cosine",
    "token_operands",
    "untransformed",
]

Grads = tuple[Tensor, Tensor, Tensor]


def contrastive_block(problem: ContrastiveProblem) -> ContrastiveStats:
    """The statistics of rows against a block of columns."""
    *stats, _ = torch.ops.mmkernels.contrastive_fwd(*_contrastive(problem), False)
    return ContrastiveStats(*stats)


def contrastive_block_grads(
    problem: ContrastiveProblem, stats: Sequence[Tensor], grads: Sequence[Tensor], needs: list[bool]
) -> Grads:
    """Gradients of a, b and scale of a block, those that are needed: of the statistics of all columns, cut to the
    block's, and of the first five of their gradients."""
    return torch.ops.mmkernels.contrastive_bwd(*_contrastive(problem), list(stats), list(grads), needs)


def _contrastive(p: ContrastiveProblem) -> tuple[Tensor | bool | None, ...]:
    return p.a, p.b, p.scale, p.positives, p.exclude, p.teacher_a, p.teacher_b, p.symmetric


def sigmoid_block(
    operands: tuple[Tensor, Tensor, Tensor, Tensor], labels: tuple[Tensor, Tensor], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses of rows against a block of columns, of a, b, scale and bias, and the gradients of those
    that need one."""
    loss, da, db, totals = torch.ops.mmkernels.sigmoid_fwd(*operands, *labels, "sum", needs)
    a, _, scale, _ = operands
    dscale, dbias = totals[1:] if len(totals) > 1 else (totals[1:], totals[1:])
    return loss, finished_sigmoid(da, a, scale), finished_sigmoid(db, a, scale), dscale, dbias


def token_block(problem: TokenProblem) -> TokenContrastiveStats:
    """As `contrastive_block`, of tokens."""
    return TokenContrastiveStats(*torch.ops.mmkernels.token_contrastive_fwd(*_tokens(problem)))


def token_block_grads(
    problem: TokenProblem, stats: Sequence[Tensor], grads: Sequence[Tensor], needs: list[bool]
) -> Grads:
    """As `contrastive_block_grads`, of tokens and of the first eight gradients."""
    return torch.ops.mmkernels.token_contrastive_bwd(*_tokens(problem), list(stats), list(grads), needs)


def _tokens(p: TokenProblem) -> tuple[Tensor | bool | None, ...]:
    labels = p.row_labels, p.col_labels
    return p.tokens, p.b, p.scale, p.positives, *labels, p.tokens_mask, p.b_mask, p.with_totals


def keeps_logits(num_logits: int, *, is_cpu: bool) -> bool:
    """Whether the contrastive ops store so many logits, which then stay in a CPU's cache, for their backward."""
    return is_cpu and num_logits < STORED_LOGITS


def contrastive_bytes(num_rows: int, num_cols: int, width: int, element_size: int, *, is_cpu: bool) -> int | float:
    """Bytes that the contrastive ops hold of the matrix of logits, and of partial sums beside it, where they store no
    logits."""
    of_grad = max(element_size, 4)
    if is_cpu:
        # the tile, its gradient, and the product that is added to the columns' gradient
        return of_grad * (2 * min(num_rows, TILE) * min(num_cols, TILE) + min(num_cols, TILE) * width)
    chunk = min(chunk_rows(num_cols, element_size), num_rows)
    # two values of each row and column of each tile of 128 x 128
    partials = min(num_rows * num_cols, MAX_LOGITS) * 4 * 4 // 128
    return max(partials, chunk * num_cols * element_size + num_cols * width * of_grad)
