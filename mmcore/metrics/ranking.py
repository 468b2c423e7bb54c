"""Where the best right answer stands among all candidates, in memory that does not grow with the queries."""

from collections.abc import Callable, Iterator

from torch import Tensor

from mmcore.ops import require

RelevanceRows = Callable[[int, int], Tensor]


def check_features(caller: str, **features: Tensor) -> None:
    """ValueError unless each is [*, E] with one E, floating point, finite and not empty."""
    widths = {name: t.shape[-1] if t.ndim == 2 else None for name, t in features.items()}
    for name, t in features.items():
        fits = t.ndim == 2 and t.is_floating_point() and t.numel() > 0
        sentence = "{} must be floating point [N, E], not empty, got {} {}"
        require(caller, fits, sentence, name, t.dtype, list(t.shape))
        # a NaN is never above another score, so it would count as a hit
        strays = int((~t.isfinite()).sum())
        require(caller, strays == 0, "{} must be finite, got {} values that are not", name, strays)
    require(caller, len(set(widths.values())) <= 1, "features must share their last dimension, got {}", widths)


def check_ks(caller: str, ks: tuple[int, ...]) -> None:
    """ValueError unless `ks` holds at least one rank, all of them at least 1."""
    require(caller, len(ks) > 0 and min(ks) >= 1, "ks must be at least one rank, each at least 1, got {}", ks)


def counts_of(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """For each query, a row of `scores`, how many wrong candidates stand above its best right one, ties counting
    against it, and how many are right: int64.

    So a model that gives one embedding to everything scores 0, not 1.
    """
    right = right.to(scores.device)
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1), right.sum(dim=1)


def wrong_above_best(
    queries: Tensor, candidates: Tensor, relevant: RelevanceRows, *, chunk_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`counts_of` the inner products in float32 of queries [Q, E] and candidates [N, E], `chunk_size` queries at a
    time.

    `relevant` maps (start, stop) to a bool mask [stop - start, N] of right candidates, at least one a query.
    """
    candidates = candidates.float()
    for start in range(0, len(queries), chunk_size):
        stop = min(start + chunk_size, len(queries))
        yield counts_of(queries[start:stop].float() @ candidates.T, relevant(start, stop))
