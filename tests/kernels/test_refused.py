"""What the public functions refuse: each bad argument by its name, what it must be, and what was given."""

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import ones, tensor

import mmkernels as mk
from mmkernels import QKNorm, alibi_slopes, masks, rotary, xpos

# what is changed in a good call, and what is said of it, where `...` is any text
Rows = list[tuple[dict[str, Any], str]]


def overlap(one: str, other: str) -> str:
    return f"{one} must share no memory with {other}, got tensors that overlap"


A, I = ones(3, 4), torch.arange(3)
T, B = ones(3, 2, 4), A
H, W, Y, X = A, ones(5, 4), torch.zeros(3, dtype=torch.int64), A
ONE, LONG, KEPT = ones(4), ones(8), ones(4, dtype=torch.bool)
x, at = ones(2, 5, 3, 8), torch.arange(5)
one, two = tensor([[0, 1, 2]]), tensor([[3, 3, 3]])
with_two = masks.intervals(3, one, two, one, two)
# a line a mistake
# fmt: off
ATTENTION: Rows = [
    (dict(q=ones(2, 9, 16)), "q must be [B, Lq, H, K], got shape [2, 9, 16]"),
    (dict.fromkeys("qkv", ones(2, 3, 4, 257)), "q must have K from 1 to 256, got 257"),
    (dict(q=ones(2, 9, 4, 16, dtype=torch.int32)), "q must be float32, ..., got torch.int32"),
    (dict(k=ones(2, 20, 2, 16).half()), "k must have the dtype of q, torch.float32, got..."),
    (dict(k=ones(2, 20, 2, 8)), "k must have q's K of 16, got 8"),
    (dict(q=ones(3, 9, 4, 16)), "q must have a batch of 1 or 2 like k, got 3"),
    (dict(q=ones(2, 9, 3, 16)), "q must have a multiple of k's 2 heads, got 3"),
    (dict(v=ones(2, 21, 2, 16)), "v must be of the shape of k, [2, 20, 2, 16], got..."),
    (dict(k=(ones(2, 20, 2, 16),) * 2), "v must be a pair like k, or neither, got Tensor"),
    (dict(mask=masks.causal(9, 21)), "mask must be of Lk = 20 keys, got 21"),
    (dict(mask=masks.causal(8, 20)), "mask must be of Lq = 9 queries, got 8"),
    (dict(mask=masks.lengths(ones(3, dtype=torch.int64), 9, 20)), "mask must be of a batch of 1 or 2, got 3"),
    (dict(mask=masks.dense(ones(1, 3, 9, 20, dtype=torch.bool))), "mask must be of 1 or 4 heads, got 3"),
    (dict(mask=masks.dense(ones(9, 20, dtype=torch.float16))), "mask must be one of ..., got torch.float16"),
    (dict(dropout_p=1.0), "dropout_p must be from 0, below 1, got 1.0"),
    (dict(dropout_p=0.1, seed=ones(2)), "seed must be an int or int64 [], got torch.float32 [2]"),
    (dict(gate=ones(3)), "gate must be [], [1] or [4], got shape [3]"),
    (dict(qk_norm=QKNorm(ones(16), ones(8))), "qk_norm.k_weight must be [16], got..."),
    (dict(alibi_slopes=ones(3)), "alibi_slopes must be [4] or [2, 4], got shape [3]"),
    (dict(alibi_slopes=ones(4, requires_grad=True)), "alibi_slopes must be constants, got some with a gradient"),
    (dict(empty_rows="nan"), "empty_rows must be one of ('zero', 'uniform'), got 'nan'"),
    (dict(empty_rows="uniform", alibi_slopes=ONE), "empty_rows must be 'zero' with alibi_slopes, got 'uniform'"),
    (dict(backend="magic"), "backend must be one of (...), got 'magic'"),
]
FEATURES: Rows = [
    (dict(a=A[0]), "a must be [M, D], got shape [4]"),
    (dict(a=A[:, :0], b=A[:, :0]), "a must be at least one wide, got shape [3, 0]"),
    (dict(b=A[:, :2]), "b must be [N, 4], as wide as a, got shape [3, 2]"),
    (dict(b=A.to("meta")), "b must be on the device of a, cpu, got meta"),
    (dict(b=A.half()), "b must have the dtype of a, torch.float32, got torch.float16"),
    (dict(a=A.int(), b=A.int()), "a must be float32, ... got torch.int32"),
    (dict(logit_scale=math.inf), "logit_scale must be finite, got inf"),
    (dict(logit_scale=tensor(math.nan)), "logit_scale must be finite, got nan"),
    (dict(logit_scale=ones(2)), "logit_scale must be a float or ... element, got shape [2]"),
    (dict(logit_scale=tensor(1)), "logit_scale must be floating point, got torch.int64"),
    (dict(logit_scale=ones((), device="meta")), "logit_scale must be on the device of a, cpu, got meta"),
]
CONTRASTIVE: Rows = [(dict(b=A[None]), "b must be [N, D], got shape [1, 3, 4]")]
CONTRASTIVE_LOSS: Rows = [
    (dict(b=A[:2]), "b must have the shape of a, [3, 4], got [2, 4]"),
    (dict(positives=I.int()), "positives must be int64 [3], got torch.int32 [3]"),
    (dict(positives=I[:2]), "positives must be int64 [3], got torch.int64 [2]"),
    (dict(positives=I + 1), "positives must be from 0 to N - 1 = 2, got 1 to 3"),
    (dict(positives=I, labels=(I, I)), "positives must be None where labels are given, got both"),
    (dict(labels=(I, I[:2])), "labels[1] must be int64 [3], got torch.int64 [2]"),
    (dict(labels=(I, I), reduction="none"),
     "reduction must be 'mean' or 'sum' with labels and symmetric=True, got 'none'"),
    (dict(negatives=A[:, :2]), "negatives must be [K, 4], as wide as a, got shape [3, 2]"),
    (dict(teacher=(A, A)), "alpha must be above 0 with a teacher, got 0.0"),
    (dict(alpha=0.4), "teacher must be given with alpha, got alpha=0.4"),
    (dict(teacher=(A, A), alpha=1.5), "alpha must be from 0 to 1, got 1.5"),
    (dict(teacher=(A, A[:2]), alpha=0.4),
     "teacher[1] must be torch.float32 [3, 4] like the student's, got torch.float32 [2, 4]"),
    (dict(label_smoothing=-0.1), "label_smoothing must be from 0 to 1, got -0.1"),
    (dict(reduction="batchmean"), "reduction must be one of ..., got batchmean"),
    (dict(exclude=-I, label_smoothing=0.1), "label_smoothing must be 0 with exclude, got 0.1"),
    (dict(exclude=I - 1, symmetric=False, label_smoothing=0.1), "label_smoothing must be 0 with exclude, got 0.1"),
    (dict(exclude=2 - I), "exclude must not be the row's positive, got column 1 for row 1"),
    (dict(exclude=2 - I, symmetric=False), "exclude must not be the row's positive, got column 1 for row 1"),
    (dict(exclude=I - 1, labels=(I // 2, I // 2)), "exclude must not be the row's positive, got column 0 for row 1"),
]
EXCLUDE: Rows = [
    (dict(exclude=I.int()), "exclude must be int64 [3], got torch.int32 [3]"),
    (dict(exclude=I[:2]), "exclude must be int64 [3], got torch.int64 [2]"),
    (dict(exclude=I[None]), "exclude must be int64 [3], got torch.int64 [1, 3]"),
    (dict(exclude=I.to("meta")), "exclude must be on the device of a, cpu, got meta"),
]
CONTRASTIVE_STATS: Rows = [
    (dict(exclude=I, positives=2 - I), "exclude must not be the row's positive, got column 1 for row 1"),
]
SIGMOID: Rows = [
    (dict(b=A[None]), "b must be [N, 4], as wide as a, got shape [1, 3, 4]"),
    (dict(b=A.int()), "b must be float32, ... got torch.int32"),
    (dict(b=A[:2]), "b must have the shape of a, [3, 4], where there are no labels, got [2, 4]"),
    (dict(logit_bias=math.nan), "logit_bias must be finite, got nan"),
    (dict(labels=(I[:2], I)), "labels[0] must be int64 [3], got torch.int64 [2]"),
    (dict(labels=(I, I.int())), "labels[1] must be int64 [3], got torch.int32 [3]"),
    (dict(reduction="rows"), "reduction must be one of none, sum, mean, got rows"),
]
TOKENS: Rows = [
    (dict(tokens=B), "tokens must be [M, Q, D], Q and D at least one, got shape [3, 4]"),
    (dict(b=B[:, :2]), "b must be [N, 4] or [N, T, 4], as wide as tokens, ... got shape [3, 2]"),
    (dict(b=B.to("meta")), "b must be on the device of tokens, cpu, got meta"),
    (dict(b=B.half()), "b must have the dtype of tokens, torch.float32, got torch.float16"),
    (dict(tokens=T.int()), "tokens must be float32, ... got torch.int32"),
    (dict(b=B.int()), "b must be float32, ... got torch.int32"),
    (dict(b=B[:2]), "b must have M = 3 rows without positives, got 2"),
    (dict(logit_scale=math.inf), "logit_scale must be finite, got inf"),
    (dict(positives=I.int()), "positives must be int64 [3], got torch.int32 [3]"),
    (dict(positives=I + 1), "positives must be from 0 to N - 1 = 2, got 1 to 3"),
    (dict(positives=I - 1), "positives must be from 0 to N - 1 = 2, got -1 to 1"),
    (dict(positives=I, labels=(I, I)), "positives must be None with labels, got both"),
    (dict(labels=(I, I[:2])), "labels[1] must be int64 [3], got torch.int64 [2]"),
    (dict(label_smoothing=1.5), "label_smoothing must be from 0 to 1, got 1.5"),
    (dict(reduction="max"), "reduction must be one of ..., got 'max'"),
    (dict(b=B[:2], labels=(I, I[:2]), reduction="none"),
     "b must have M = 3 rows with labels, symmetric and reduction='none', got 2"),
    (dict(masks=(ones(3, 2), None)), "masks[0] must be bool [3, 2], got torch.float32 ..."),
    (dict(masks=(None, B > 0)), "masks[1] must be None where b is [N, D], got a mask"),
]
TOKEN_STATS: Rows = [(dict(positives=I - 2), "positives must be from -1 to N - 1 = 2, got -2 to 0")]
CROSS_ENTROPY: Rows = [
    (dict(hidden=H[None]), "hidden must be [T, D], got shape [1, 3, 4]"),
    (dict(hidden=H[:, :0], weight=W[:, :0]), "hidden must be at least one wide, got shape [3, 0]"),
    (dict(hidden=H.int()), "hidden must be float32, ... got torch.int32"),
    (dict(weight=W[:, :2]), "weight must be [V, 4], as wide as hidden, got shape [5, 2]"),
    (dict(weight=W[:0]), "weight must have at least one row, got shape [0, 4]"),
    (dict(weight=W.int()), "weight must be float32, ... got torch.int32"),
    (dict(weight=W.half()), "weight must have the dtype of hidden, torch.float32, got torch.float16"),
    (dict(weight=W.to("meta")), "weight must be on the device of hidden, cpu, got meta"),
    (dict(targets=Y[:2]), "targets must be int64 [3], got torch.int64 [2]"),
    (dict(bias=W), "bias must be [5], got shape [5, 4]"),
    (dict(bias=W[:, 0].half()), "bias must have the dtype of hidden, torch.float32, got torch.float16"),
    (dict(bias=Y[:1].expand(5)), "bias must be float32, ... got torch.int64"),
    (dict(bias=W[:, 0].to("meta")), "bias must be on the device of hidden, cpu, got meta"),
    (dict(label_smoothing=1.1), "label_smoothing must be in [0, 1], got 1.1"),
    (dict(z_loss=math.inf), "z_loss must be finite and at least 0, got inf"),
    (dict(reduction="max"), "reduction must be one of none, sum, mean, got max"),
]
DISTILLATION: Rows = [
    (dict(student=X[0], teacher=X[0]), "student must be [B, C], got shape [4]"),
    (dict(student=X[:, :0], teacher=X[:, :0]), "student must have at least one class, got shape [3, 0]"),
    (dict(teacher=X[:2]), "teacher must have the shape of student, [3, 4], got [2, 4]"),
    (dict(student=X.int()), "student must be float32, ... got torch.int32"),
    (dict(teacher=X.to("meta")), "teacher must be on the device of student, cpu, got meta"),
    (dict(center=X[0, :2]), "center must be [4], got shape [2]"),
    (dict(center=X[0].to("meta")), "center must be on the device of student, cpu, got meta"),
    (dict(student_temp=0.0), "student_temp must be above 0, got 0.0"),
    (dict(teacher_temp=tensor(-1.0)), "teacher_temp must be above 0, got -1.0"),
    (dict(teacher_temp=math.nan), "teacher_temp must be finite, got nan"),
    (dict(student_temp=ones((), requires_grad=True)),
     "student_temp must be a constant, got one that requires a gradient"),
    (dict(reduction="batchmean"), "reduction must be one of ..., got batchmean"),
]
FISHER: Rows = [
    (dict(grads=[]), "grads must be 1 tensors like fishers, got 0"),
    (dict(grads=[ones(5)]), "grads[0] must be [4], got [5]"),
    (dict(fishers=[ONE.bfloat16()]), "fishers[0] must be float32 or float64, got torch.bfloat16"),
    (dict(grads=[ONE.int()]), "grads[0] must be float32, ..., got torch.int32"),
    (dict(fishers=[ONE], grads=[ONE]), overlap("fishers[0]", "grads[0]")),
    (dict(fishers=[ones(8)[::2]]), "fishers[0] must be dense in strides [2], got [2]"),
    (dict(weight=-0.5), "weight must be at least 0, got -0.5"),
    (dict(decay=1.5), "decay must be from 0 to 1, got 1.5"),
]
PENALTY: Rows = [
    (dict(anchors=[]), "anchors must be 1 tensors like params, got 0"),
    (dict(fishers=[ones(5)]), "fishers[0] must be [4], got [5]"),
    (dict(fishers=[ONE.int()]), "fishers[0] must be float32, ..., got torch.int32"),
    (dict(anchors=[ones(4, device="meta")]), "anchors[0] must be on cpu, got meta"),
    (dict(strength=-1.0), "strength must be at least 0, got -1.0"),
]
NORM: Rows = [(dict(tensors=[ones(1), ones(1).long()]), "tensors[1] must be float32, ..., got torch.int64")]
CLIP: Rows = [
    (dict(tensors=[ONE.int()]), "tensors[0] must be float32, ..., got torch.int32"),
    (dict(tensors=[ones(8)[::2]]), "tensors[0] must be dense in strides [2], got [2]"),
    (dict(max_norm=-1.0), "max_norm must be at least 0, got -1.0"),
    (dict(norm=-2.0), "norm must be at least 0, got -2.0"),
    (dict(norm=tensor(-2.0)), "norm must be at least 0, got -2.0"),
    (dict(norm=ones(2)), "norm must be one number, got shape [2]"),
]
EMA: Rows = [
    (dict(sources=[]), "sources must be 1 tensors like targets, got 0"),
    (dict(shadows=[]), "shadows must be 1 tensors like targets, got 0"),
    (dict(sources=[ones(5)]), "sources[0] must be [4], got [5]"),
    (dict(sources=[ONE.int()]), "sources[0] must be float32, ..., got torch.int32"),
    (dict(targets=[ONE, ONE], sources=[ones(4), ones(4)]), overlap("targets[1]", "targets[0]")),
    (dict(targets=[ONE[:2], ones(2)], sources=[ones(2), ONE[1:3]]), overlap("sources[1]", "targets[0]")),
    (dict(targets=[ones(6), ones(1)], sources=[LONG[:6], LONG[1:2]], shadows=[ones(6), LONG[5:6]]),
     overlap("shadows[1]", "sources[0]")),
    (dict(targets=[ones(8)[::2]]), "targets[0] must be dense in strides [2], got [2]"),
    (dict(targets=[ones(2, 3)], sources=[ones(2, 3)], shadows=[ones(3, 2).T]),
     "shadows[0] must be dense in strides [3, 1], got [1, 2]"),
    (dict(decay=1.5), "decay must be from 0 to 1, got 1.5"),
    (dict(decay=ones(2)), "decay must be one number, got shape [2]"),
    (dict(targets=[ONE.bfloat16()], decay=0.99), "decay must be below 0.99 for targets in torch.bfloat16, got 0.99"),
    (dict(targets=[ONE.half()], decay=tensor(0.9999)),
     "decay must be below 0.999 for targets in torch.float16, got 0.9998..."),
    (dict(rounding="up"), "rounding must be one of (None, 'stochastic'), got 'up'"),
    (dict(rounding="stochastic"), "rounding must be None for targets other than bfloat16, got them in {torch.float32}"),
]
MAXSIM: Rows = [
    (dict(q=ones(2, 3)), "q must be [B, Lq, D], Lq and D at least one, got shape [2, 3]"),
    (dict(q=ones(2, 0, 8)), "q must be [B, Lq, D], Lq and D at least one, got shape [2, 0, 8]"),
    (dict(q=ones(2, 3, 8, dtype=torch.int32)), "q must be float32, ..., got torch.int32"),
    (dict(d=ones(4, 5, 7)), "d must be [N, Ld, 8], as wide as q, Ld at least one, got shape [4, 5, 7]"),
    (dict(d=ones(4, 0, 8)), "d must be [N, Ld, 8], as wide as q, Ld at least one, got shape [4, 0, 8]"),
    (dict(d=ones(4, 5, 8).half()), "d must have the dtype of q, torch.float32, got torch.float16"),
    (dict(d=ones(4, 5, 8, device="meta")), "d must be on the device of q, cpu, got meta"),
    (dict(q_mask=ones(2, 3)), "q_mask must be bool [2, 3], got torch.float32 [2, 3]"),
    (dict(d_mask=ones(2, 3, dtype=torch.bool)), "d_mask must be bool [4, 5], got torch.bool [2, 3]"),
]
ADAMW: Rows = [
    (dict(grads=[]), "grads must be 1 tensors like params, got 0"),
    (dict(exp_avgs=[ones(5)]), "exp_avgs[0] must be [4], got [5]"),
    (dict(grads=[ONE.long()]), "grads[0] must be float32, ..., got torch.int64"),
    (dict(averages=[ONE.bfloat16()]), "averages[0] must be float32 or float64, got torch.bfloat16"),
    (dict(averages=[ONE], params=[ONE]), overlap("...[0]", "...[0]")),
    (dict(params=[ones(8)[::2]]), "params[0] must be dense in strides [2], got [2]"),
    (dict(shadows=[ONE]), "shadows must come with averages, got none"),
    (dict(lr=-0.1), "lr must be from 0 to inf, got -0.1"),
    (dict(lr=ones(2)), "lr must be one number, got shape [2]"),
    (dict(step=0), "step must be from 1 to inf, got 0"),
    (dict(averages=[ONE], decay=1.1), "decay must be from 0 to 1.0, got 1.1"),
    (dict(betas=(1.0, 0.9)), "betas must be from 0 to less than 1, got (1.0, 0.9)"),
    (dict(eps=-1.0), "eps must be at least 0, got -1.0"),
    (dict(weight_decay=math.nan), "weight_decay must be at least 0, got nan"),
    (dict(clamp=(2, 1)), "clamp must be (low, high), got (2, 1)"),
]
APPLY_MASKS: Rows = [
    (dict(masks=[]), "masks must be 1 tensors like tensors, got 0"),
    (dict(masks=[KEPT[:3]]), "masks[0] must be [4], got [3]"),
    (dict(tensors=[ONE.int()]), "tensors[0] must be float32, ..., got torch.int32"),
    (dict(masks=[KEPT.byte()]), "masks[0] must be bool, got torch.uint8"),
    (dict(owners=(1, 1)), "masks[0] must be uint8 with owners, got torch.bool"),
    (dict(masks=[KEPT.byte()], owners=(2, 1)), "owners must be 0 <= first <= last <= 255, got (2, 1)"),
    (dict(tensors=[ones(8)[::2]]), "tensors[0] must be dense in strides [2], got [2]"),
    (dict(tensors=[KEPT.float()] * 2, masks=[KEPT] * 2), overlap("tensors[1]", "tensors[0]")),
]
CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: rotary(x[0], at), "rotary: x must be [B, L, H, K], got shape [5, 3, 8]"),
    (lambda: rotary(x.int(), at), "rotary: x must be float32, ..., got torch.int32"),
    (lambda: rotary(x, at, dims=3), "rotary: dims must be even, from 2 to K = 8, got 3"),
    (lambda: rotary(x, at, dims=10), "rotary: dims must be even, from 2 to K = 8, got 10"),
    (lambda: rotary(x, at, theta=0.0), "rotary: theta must be above 0, got 0.0"),
    (lambda: rotary(x, at[:4]), "rotary: positions must be [5] or [2, 5], got shape [4]"),
    (lambda: rotary(x, at > 0), "rotary: positions must be integers or floating point, got torch.bool"),
    (lambda: rotary(x, at.to("meta")), "rotary: positions must be on the device of x, cpu, got meta"),
    (lambda: xpos(x[0], x, at, at), "xpos: q must be [B, Lq, H, K], got shape [5, 3, 8]"),
    (lambda: xpos(x, x[0], at, at), "xpos: k must be [B, Lk, Hkv, K], got shape [5, 3, 8]"),
    (lambda: xpos(x[..., :7], x, at, at), "xpos: q must have an even K, got 7"),
    (lambda: xpos(x, x[..., :6], at, at), "xpos: k must have q's K of 8, got 6"),
    (lambda: xpos(x, x.half(), at, at), "xpos: k must have the dtype of q, torch.float32, got torch.float16"),
    (lambda: xpos(x, x.to("meta"), at, at), "xpos: k must be on the device of q, cpu, got meta"),
    (lambda: xpos(x, x, at[:4], at), "xpos: q_positions must be [5] or [2, 5], got shape [4]"),
    (lambda: xpos(x, x[:, :4], at, at), "xpos: k_positions must be [4] or [2, 4], got shape [5]"),
    (lambda: xpos(x, x, at, at, theta=-1.0), "xpos: theta must be above 0, got -1.0"),
    (lambda: xpos(x, x, at, at, scale_base=0.0), "xpos: scale_base must be above 0, got 0.0"),
    (lambda: alibi_slopes(0), "alibi_slopes: num_heads must be at least 1, got 0"),
    (lambda: masks.causal(3, 4) & masks.causal(3, 5),
     "masks: & must join masks of equal lengths, got 3 and 3 queries, 4 and 5 keys"),
    (lambda: with_two & with_two, "masks: & must join masks of which one has one interval, got (2, 2)"),
    (lambda: operator.and_(with_two, masks.dense(ones(3, 3))), "masks: & must join masks of intervals, got Dense"),
    (lambda: masks.lengths(ones(2).int(), 3, 3) & masks.lengths(ones(3).int(), 3, 3),
     "masks: & must join masks of one batch or of equal batches, got 2 and 3"),
    (lambda: masks.intervals(3, one, two, one), "masks.intervals: lo2 and hi2 must come together, got one"),
    (lambda: masks.intervals(3, one[0], two[0]), "masks.intervals: lo must be [B, Lq], got shape [3]"),
    (lambda: masks.intervals(3, one.float(), two), "masks.intervals: lo must be of integers, got torch.float32"),
    (lambda: masks.intervals(3, one, two[:, :2]),
     "masks.intervals: hi must be [1, 3] on cpu like lo, got [1, 2] on cpu"),
    (lambda: masks.intervals(2, one, two), "masks.intervals: ends must be from 0 to 2, got 0 to 3"),
    (lambda: masks.intervals(3, one, one.flip(1)), "masks.intervals: lo must be at most hi, got at (0, 2) 2 and 0"),
    (lambda: masks.key_padding(ones(3).bool(), 2), "masks.key_padding: keys must be [B, Lk], got shape [3]"),
    (lambda: masks.key_padding(one, 2), "masks.key_padding: keys must be bool, got torch.int64"),
    (lambda: masks.lengths(one, 2, 3), "masks.lengths: num_seen must be [B], got shape [1, 3]"),
    (lambda: masks.lengths(one[0].float(), 2, 3), "masks.lengths: num_seen must be of integers, got torch.float32"),
    (lambda: masks.lengths(one[0], 2, 1), "masks.lengths: num_seen must be from 0 to 1, got 0 to 2"),
    (lambda: masks.documents(one[0]), "masks.documents: ids must be [B, L], got shape [3]"),
    (lambda: masks.documents(one.float()), "masks.documents: ids must be of integers, got torch.float32"),
    (lambda: masks.prefix_causal(one, 3), "masks.prefix_causal: prefix must be [B], got shape [1, 3]"),
    (lambda: masks.media(one[0].bool(), 1, 1), "masks.media: locations must be [B, Lq], got shape [3]"),
    (lambda: masks.media(one, 1, 1), "masks.media: locations must be bool, got torch.int64"),
    (lambda: masks.media(one.bool(), 1, 4), "masks.media: num_media must be at least the 2 of locations, got 1"),
    (lambda: masks.tiles(one, 4), "masks.tiles: seen must be [B, Lq, ...], got shape [1, 3]"),
    (lambda: masks.qformer_itc(4, one, 3), "masks.qformer_itc: num_text must be [B], got shape [1, 3]"),
    (lambda: masks.qformer_itg(4, two[0], 2), "masks.qformer_itg: num_text must be from 0 to 2, got 3 to 3"),
    (lambda: masks.dense(ones(3)), "masks.dense: values must be [B, H, Lq, Lk], got shape [3]"),
    (lambda: masks.dense(one), "masks.dense: values must be bool or floating point, got torch.int64"),
    (lambda: masks.from_dense(ones(3, 3)), "masks.from_dense: values must be bool, got torch.float32"),
]
# fmt: on


def listed(*names: str, **options: Any) -> dict[str, Any]:
    return {name: [ones(4)] for name in names} | options


PAIR, LOGITS = (listed(a=A, b=A, logit_scale=1.0), listed(student=X, teacher=X, student_temp=1.0, teacher_temp=1.0))
TOKEN_PAIR = listed(tokens=T, b=B, logit_scale=1.0)
MOMENTS = listed("params", "grads", "exp_avgs", "exp_avg_sqs", lr=0.1, step=1)
QKV = listed(q=ones(2, 9, 4, 16), k=ones(2, 20, 2, 16), v=ones(2, 20, 2, 16))
OPS: list[tuple[Callable[..., Any], str, dict[str, Any], Rows]] = [
    (mk.attention, "attention", QKV, ATTENTION),
    (mk.contrastive_loss, "contrastive", PAIR, FEATURES + CONTRASTIVE + EXCLUDE + CONTRASTIVE_LOSS),
    (mk.contrastive_lse, "contrastive", PAIR, FEATURES + CONTRASTIVE + EXCLUDE),
    (mk.contrastive_stats, "contrastive", PAIR, FEATURES + CONTRASTIVE + EXCLUDE + CONTRASTIVE_STATS),
    (mk.sigmoid_loss, "sigmoid_loss", PAIR | {"logit_bias": 0.0}, FEATURES + SIGMOID),
    (mk.token_contrastive_loss, "token_contrastive", TOKEN_PAIR, TOKENS),
    (mk.token_contrastive_stats, "token_contrastive", TOKEN_PAIR, TOKEN_STATS),
    (mk.linear_cross_entropy, "linear_cross_entropy", listed(hidden=H, weight=W, targets=Y), CROSS_ENTROPY),
    (mk.distillation_loss, "distillation_loss", LOGITS, DISTILLATION),
    (mk.maxsim, "maxsim", listed(q=ones(2, 3, 8), d=ones(4, 5, 8)), MAXSIM),
    (mk.fisher_accumulate_, "fisher_accumulate_", listed("fishers", "grads"), FISHER),
    (mk.ewc_penalty, "ewc_penalty", listed("params", "anchors", "fishers", strength=1.0), PENALTY),
    (mk.global_norm, "global_norm", {}, NORM),
    (mk.clip_, "clip_", listed("tensors", max_norm=1.0), CLIP),
    (mk.ema_update_, "ema_update_", listed("targets", "sources", decay=0.5), EMA),
    (mk.adamw_update_, "adamw_update_", MOMENTS, ADAMW),
    (mk.apply_masks_, "apply_masks_", listed("tensors", masks=[KEPT]), APPLY_MASKS),
]
REFUSED = [
    (lambda op=op, given=base | changed: op(**given), f"{name}: {message}")
    for op, name, base, rows in OPS
    for changed, message in rows
] + CALLS


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_bad_argument_is_refused_by_name_contract_and_value(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        call()
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert re.fullmatch(pattern, str(refused.value)), f"{refused.value}, expected {message}"
