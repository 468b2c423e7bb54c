"""What the contrastive loss over the global batch takes on a rank: `mmcore.losses` in numbers."""

from typing import NamedTuple

from mmcore.losses.ranks import HEADER_BYTES
from mmcore.losses.shards import GATHER_LIMIT_BYTES
from mmcore.plan.job import Exchange
from mmkernels.pieces import Cost, contrastive_bytes, contrastive_cost, keeps_logits

# Models make their features float32, whatever they compute in.
FEATURE_BYTES = 4
# Vectors of float64 over all columns while statistics are merged; those of a ring's blocks wait until all are there.
VECTORS, VECTORS_OF_RING = 9, 18


class Loss(NamedTuple):
    """The loss of a rank."""

    is_ring: bool  # features travel around a ring; else they are gathered
    gathered: float  # bytes of others' features and of their gradient
    workspace: float  # all other bytes, the gradients of the own features included
    sent: dict[str, float]  # bytes sent in a step
    cost: Cost  # of its forward and backward


def loss(
    exchange: Exchange, rows: int, ranks: int, *, is_cpu: bool, is_ring: bool | None = None, size: int = FEATURE_BYTES
) -> Loss:
    """Of each of `ranks` ranks with `rows` samples; `is_cpu`, the op runs blockwise, not in Triton; `is_ring` None = as
    `global_contrastive_loss` chooses; `size`, bytes of an element of a feature, whose gradient has 4 at least."""
    columns, of_grad = rows * ranks, max(size, 4)
    features, gradient = rows * exchange.width * size, rows * exchange.width * of_grad  # bytes of a rank's
    if is_ring is None:
        is_ring = ranks * features > GATHER_LIMIT_BYTES
    held = rows if is_ring else columns
    workspace = gradient * (1 + exchange.num_tokens)  # of both sides
    tiles = contrastive_bytes(rows * exchange.num_tokens, held, exchange.width, size, is_cpu=is_cpu)
    # all similarities of the batch, gathered on every rank, and what negatives are drawn by, in float64
    gathered = 4 * columns**2 + 3 * 8 * rows * columns if exchange.has_hard_negatives else 0.0
    sent: dict[str, float] = {}
    if ranks == 1:
        workspace += of_grad * rows**2 if keeps_logits(rows**2, is_cpu=is_cpu) else tiles
    else:
        workspace += gradient * exchange.num_tokens  # the sum over blocks, of the side that stays
        workspace += 8 * columns * (VECTORS_OF_RING if is_ring else VECTORS)
        if is_ring:
            # two shards; of their gradient one that is made, one that is received, one on its way
            gathered += 2 * features + 3 * gradient
            workspace += tiles
        else:
            # the gradient is copied to be scattered, when the tiles are gone
            gathered += ranks * (features + 2 * gradient)
            workspace += max(0.0, tiles - ranks * gradient)
        # of the columns' statistics: maxima, sums, and their gradient, float64, by all-reduce
        statistics = 3 * 2 * (ranks - 1) * 8 * rows
        sent["features"] = (ranks - 1) * features * (2 if is_ring else 1)  # a backward's ring brings them again
        sent["their gradients"] = (ranks if is_ring else ranks - 1) * gradient
        sent["statistics"] = statistics + HEADER_BYTES * (ranks - 1)
        if exchange.has_hard_negatives:
            sent["similarities"] = (ranks - 1) * (4 * rows * rows * ranks + features)
    forward, backward = contrastive_cost(rows * exchange.num_tokens, columns, exchange.width, size)
    return Loss(is_ring, gathered, workspace, sent, forward + backward)
