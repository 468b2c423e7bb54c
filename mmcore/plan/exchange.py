"""What the contrastive loss over the global batch takes on a rank: `mmcore.losses` in numbers."""

from dataclasses import dataclass
from typing import NamedTuple

from mmcore.losses.ranks import HEADER_BYTES
from mmcore.losses.shards import GATHER_LIMIT_BYTES
from mmcore.plan.job import Exchange
from mmkernels.pieces import Cost, contrastive_bytes, contrastive_cost, keeps_logits

# Models make their features float32, whatever they compute in.
FEATURE_BYTES = 4
# Vectors of float64 over all columns while statistics are merged; those of a ring's blocks wait until all are there.
VECTORS, VECTORS_OF_RING = 9, 18


@dataclass(frozen=True)
class Loss:
    """The loss of a rank.

    Attributes:
        is_ring: whether features travel around a ring; else they are gathered.
        gathered: bytes of others' features and of their gradient.
        workspace: all other bytes, the gradients of the own features included.
        sent: bytes sent in a step.
        cost: of its forward and backward.
    """

    is_ring: bool
    gathered: float
    workspace: float
    sent: dict[str, float]
    cost: Cost


def loss(
    exchange: Exchange, rows: int, ranks: int, *, is_cpu: bool, is_ring: bool | None = None, size: int = FEATURE_BYTES
) -> Loss:
    """Of each of `ranks` ranks with `rows` samples.

    Args:
        is_cpu: the op runs blockwise, not in Triton.
        is_ring: None = as `global_contrastive_loss` chooses.
        size: bytes of an element of a feature; its gradient has 4 at least.
    """
    columns, of_grad = rows * ranks, max(size, 4)
    shard = _Shard(rows * exchange.width * size, rows * exchange.width * of_grad)
    if is_ring is None:
        is_ring = ranks * shard.features > GATHER_LIMIT_BYTES
    held = rows if is_ring else columns
    workspace = shard.gradient * (1 + exchange.num_tokens)  # of both sides
    tiles = contrastive_bytes(rows * exchange.num_tokens, held, exchange.width, size, is_cpu=is_cpu)
    # all similarities of the batch, gathered on every rank, and what negatives are drawn by, in float64
    gathered = 4 * columns**2 + 3 * 8 * rows * columns if exchange.has_hard_negatives else 0.0
    if ranks == 1:
        workspace += of_grad * rows**2 if keeps_logits(rows**2, is_cpu=is_cpu) else tiles
    else:
        workspace += shard.gradient * exchange.num_tokens  # the sum over blocks, of the side that stays
        workspace += 8 * columns * (VECTORS_OF_RING if is_ring else VECTORS)
        if is_ring:
            # two shards; of their gradient one that is made, one that is received, one on its way
            gathered += 2 * shard.features + 3 * shard.gradient
            workspace += tiles
        else:
            # the gradient is copied to be scattered, when the tiles are gone
            gathered += ranks * (shard.features + 2 * shard.gradient)
            workspace += max(0.0, tiles - ranks * shard.gradient)
    forward, backward = contrastive_cost(rows * exchange.num_tokens, columns, exchange.width, size)
    sent = {} if ranks == 1 else _sent(exchange, shard, rows, ranks, is_ring=is_ring)
    return Loss(is_ring, gathered, workspace, sent, forward + backward)


class _Shard(NamedTuple):
    """Bytes of a rank's features, and of their gradient."""

    features: int
    gradient: int


def _sent(exchange: Exchange, shard: _Shard, rows: int, ranks: int, *, is_ring: bool) -> dict[str, float]:
    # of the columns' statistics: maxima, sums, and their gradient, float64, by all-reduce; and a header
    statistics = 3 * 2 * (ranks - 1) * 8 * rows
    sent: dict[str, float] = {
        "features": (ranks - 1) * shard.features * (2 if is_ring else 1),  # a backward's ring brings them again
        "their gradients": (ranks if is_ring else ranks - 1) * shard.gradient,
        "statistics": statistics + HEADER_BYTES * (ranks - 1),
    }
    if exchange.has_hard_negatives:
        sent["similarities"] = (ranks - 1) * (4 * rows * rows * ranks + shard.features)
    return sent
