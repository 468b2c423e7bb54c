"""What the token-contrastive loss refuses."""

import math

import pytest
import torch

from mmkernels import token_contrastive_loss, token_contrastive_stats

T, B = torch.ones(3, 2, 4), torch.ones(3, 4)
ROW, COL = torch.arange(3), torch.arange(3)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((B, B, 1.0), {}, r"tokens must be \[M, Q, D\], Q and D at least one, got shape \[3, 4\]"),
        ((T[:, :0], B, 1.0), {}, r"tokens must be \[M, Q, D\], Q and D .* got shape \[3, 0, 4\]"),
        (
            (T, B[:, :2], 1.0),
            {},
            r"b must be \[N, 4\] or \[N, T, 4\], as wide as tokens, .* got shape \[3, 2\]",
        ),
        ((T, B[0], 1.0), {}, r"b must be \[N, 4\] or \[N, T, 4\], .* got shape \[4\]"),
        ((T, B.to("meta"), 1.0), {}, "b must be on the device of tokens, cpu, got meta"),
        ((T, B.half(), 1.0), {}, "b must have the dtype of tokens, torch.float32, got torch.float16"),
        ((T.int(), B, 1.0), {}, "tokens must be float32, .* got torch.int32"),
        ((T, B.int(), 1.0), {}, "b must be float32, .* got torch.int32"),
        ((T, B[:2], 1.0), {}, "b must have M = 3 rows without positives, got 2"),
        ((T, B, math.inf), {}, "logit_scale must be finite, got inf"),
        ((T, B, torch.ones(2)), {}, r"logit_scale must be a float or .* element, got shape \[2\]"),
        ((T, B, 1.0), {"positives": ROW[:2]}, r"positives must be int64 \[3\], got torch.int64 \[2\]"),
        ((T, B, 1.0), {"positives": ROW.int()}, r"positives must be int64 \[3\], got torch.int32 \[3\]"),
        ((T, B, 1.0), {"positives": ROW + 1}, "positives must be from 0 to N - 1 = 2, got 1 to 3"),
        ((T, B, 1.0), {"positives": ROW - 1}, "positives must be from 0 to N - 1 = 2, got -1 to 1"),
        (
            (T, B, 1.0),
            {"positives": ROW, "labels": (ROW, COL)},
            "positives must be None with labels, got both",
        ),
        ((T, B, 1.0), {"labels": (ROW, COL[:2])}, r"labels\[1\] must be int64 \[3\], got torch.int64 \[2\]"),
        ((T, B, 1.0), {"label_smoothing": 1.5}, "label_smoothing must be from 0 to 1, got 1.5"),
        ((T, B, 1.0), {"reduction": "max"}, r"reduction must be one of .*, got 'max'"),
        (
            (T, B[:2], 1.0),
            {"labels": (ROW, COL[:2]), "reduction": "none"},
            "b must have M = 3 rows with labels, symmetric and reduction='none', got 2",
        ),
        (
            (T, B, 1.0),
            {"masks": (torch.ones(3, 2), None)},
            r"masks\[0\] must be bool \[3, 2\], got torch.float32 .*",
        ),
        ((T, B, 1.0), {"masks": (None, B > 0)}, r"masks\[1\] must be None where b is \[N, D\], got a mask"),
    ],
)
def test_bad_input_is_refused_by_name_contract_and_value(args, kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=f"^token_contrastive: {message}$"):
        token_contrastive_loss(*args, **kwargs)


def test_the_statistics_take_minus_one_for_no_positive_and_nothing_less() -> None:
    with pytest.raises(ValueError, match="positives must be from -1 to N - 1 = 2, got -2 to 0"):
        token_contrastive_stats(T, B, 1.0, positives=ROW - 2)
