"""Where the best right answer stands among all candidates, in memory that does not grow with the queries."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

RelevanceRows = Callable[[int, int], Tensor]


def check_features(caller: str, **features: Tensor) -> None:
    """ValueError unless each is [*, E] with one E, floating point, finite and not empty."""
    widths = {name: t.shape[-1] if t.ndim == 2 else None for name, t in features.items()}
    for name, t in features.items():
        if t.ndim != 2 or not t.is_floating_point() or not t.numel():
            raise ValueError(
                f"{caller}: {name} must be floating point [N, E], not empty, got {t.dtype} {list(t.shape)}"
            )
        # a NaN is never above another score, so it would count as a hit
        if not t.isfinite().all():
            raise ValueError(f"{caller}: {name} must be finite, got {int((~t.isfinite()).sum())} values that are not")
    if len(set(widths.values())) > 1:
        raise ValueError(f"{caller}: features must share their last dimension, got {widths}")


def check_ks(caller: str, ks: tuple[int, ...]) -> None:
    """ValueError unless `ks` holds at least one rank, all of them at least 1."""
    if not ks or min(ks) < 1:
        raise ValueError(f"{caller}: ks must be at least one rank, each at least 1, got {ks}")


def wrong_above_best(
    queries: Tensor, candidates: Tensor, relevant: RelevanceRows, *, chunk_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each query, how many wrong candidates stand above its best right one; ties count against it.

    So a model that gives one embedding to everything scores 0, not 1.

    Args:
        queries: [Q, E]; scored by the inner product in float32.
        candidates: [N, E].
        relevant: (start, stop) to a bool mask [stop - start, N] of right candidates, at least one a query.
        chunk_size: queries scored at a time; chunk_size x N scores are held.

    Yields:
        For each chunk: counts [stop - start] int64, and the number of right candidates [stop - start] int64.
    """
    candidates = candidates.float()
    for start in range(0, len(queries), chunk_size):
        stop = min(start + chunk_size, len(queries))
        scores = queries[start:stop].float() @ candidates.T  # [chunk, N]
        right = relevant(start, stop).to(scores.device)
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        yield ((scores >= best) & ~right).sum(dim=1), right.sum(dim=1)
