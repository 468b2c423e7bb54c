"""How much features that did not learn classes tell of them: nearest neighbours, and a linear classifier on top."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from mmcore.metrics.retrieval import check_features
from mmcore.ops import require

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the penalty on the weights of `linear_probe_accuracy`, of which the best is taken."""
_SOLVER = {"maxiter": 1000, "gtol": 1e-4, "maxls": 50}


@torch.no_grad()
def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> float:
    """Share of features whose k nearest among others, by cosine s, have voted for their class with exp(s / temperature)
    each, as DINO measures towers (arXiv 2104.14294, section 4.1; 1805.01978). Of equal votes the lowest class wins.

    Args:
        train: features [N, D] floating point.
        train_labels: int64 [N], at least 0.
        test: features [M, D].
        test_labels: int64 [M], at least 0.
        k: neighbours, 1 to N.
        temperature: above 0.
        chunk_size: test features compared at a time.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: other shapes, labels or k, features that are not finite.
    """
    op = "knn_accuracy"
    _check(op, train, train_labels, test, test_labels)
    require(op, 1 <= k <= len(train), "k must be from 1 to the {} training features, got {}", len(train), k)
    require(op, temperature > 0, "temperature must be above 0, got {}", temperature)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    known, right = F.normalize(train.float(), dim=1), 0
    for rows, labels in zip(test.split(chunk_size), test_labels.split(chunk_size), strict=True):
        score, place = (F.normalize(rows.float(), dim=1) @ known.T).topk(k, 1)
        votes = score.new_zeros(len(rows), num_classes)
        # the largest is taken out, which changes no winner, since small temperatures overflow
        votes.scatter_add_(1, train_labels[place], ((score - score[:, :1]) / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return right / len(test)


def linear_probe_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> float:
    """Accuracy in [0, 1] of a logistic regression by L-BFGS on frozen features, as CLIP's (arXiv 2103.00020, A.3).
    It is computed on their device.

    Features are centred and scaled by the mean and deviation of the training ones. The strength of the penalty is
    chosen on a fifth of the training features; arguments and errors else as of `knn_accuracy`.

    Args:
        strengths: inverse ones, as scikit-learn's C.
        seed: of the fifth.
    """
    op = "linear_probe_accuracy"
    _check(op, train, train_labels, test, test_labels)
    require(op, len(strengths) > 0 and min(strengths) > 0, "strengths must be above 0, got {}", list(strengths))
    require(op, len(train_labels.unique()) > 1, "train_labels must be of two or more classes, got {}", 1)
    dtype = torch.float64 if train.device.type == "cpu" else torch.float32
    mean, spread = train.double().mean(0), train.double().std(0, correction=0) + 1e-6
    x, y = (((part.double() - mean) / spread).to(dtype) for part in (train, test))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))).to(x.device)
    chosen, fitted = order[: len(x) // 5], order[len(x) // 5 :]
    best = strengths[0]
    if len(strengths) > 1 and len(chosen) and len(train_labels[fitted].unique()) > 1:
        right = [_right(x[fitted], train_labels[fitted], x[chosen], train_labels[chosen], c) for c in strengths]
        best = strengths[int(np.argmax(right))]
    return _right(x, train_labels, y, test_labels, best)


def _right(x: Tensor, labels: Tensor, others: Tensor, wanted: Tensor, strength: float) -> float:
    """Of the regression of labels on [N, D] the share of `others` [M, D] that it classifies as wanted: the weights
    [D + 1, C], the last row the biases, minimise the mean cross-entropy + (squared weights) / (2 N strength)."""
    known, places = labels.unique(return_inverse=True)
    rows, decay = torch.arange(len(x), device=x.device), 1 / (strength * len(x))
    shape = x.shape[1] + 1, len(known)

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(flat).to(x).view(shape)
        log_shares = torch.log_softmax(x @ w[:-1] + w[-1], 1)
        loss = -log_shares[rows, places].mean() + decay / 2 * w[:-1].square().sum()
        errors = log_shares.exp_()
        errors[rows, places] -= 1
        errors /= len(x)
        grad = torch.cat([x.T @ errors + decay * w[:-1], errors.sum(0, keepdim=True)])
        return loss.item(), grad.flatten().double().cpu().numpy()

    # the weakest penalties have no end on separable features
    found = minimize(value, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=_SOLVER).x
    w = torch.from_numpy(found).to(x).view(shape)
    return (known[(others @ w[:-1] + w[-1]).argmax(1)] == wanted).double().mean().item()


def _check(op: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    check_features(op, train=train, test=test)
    for name, labels, rows in (("train_labels", train_labels, train), ("test_labels", test_labels, test)):
        fits = labels.shape == (len(rows),) and labels.dtype == torch.int64 and int(labels.min()) >= 0
        got = f"{labels.dtype} {list(labels.shape)}"
        require(op, fits, "{} must be int64 [{}] of at least 0, got {}", name, len(rows), got)
