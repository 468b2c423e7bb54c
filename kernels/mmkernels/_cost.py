"""What calls ask of a machine: the cost model of the planner and of bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a call asks of a machine, from which its time is predicted.

    Attributes:
        flops: floating-point operations of its matrix products.
        bytes_moved: bytes that it has to read and write in main memory.
        exps: exponentials, each with the few elementwise operations that go with it.
    """

    flops: int = 0
    bytes_moved: int = 0
    exps: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes_moved + other.bytes_moved, self.exps + other.exps)


def contrastive_cost(num_rows: int, num_cols: int, width: int, element_size: int) -> tuple[Cost, Cost]:
    """Of forward, and of backward with every gradient: 1u and 3u of products, two exponentials a logit each."""
    logits = num_rows * num_cols
    features = (num_rows + num_cols) * width * element_size
    stats = 4 * (2 * num_rows + num_cols)
    forward = Cost(2 * logits * width, features + stats, 2 * logits)
    return forward, Cost(3 * forward.flops, 2 * (features + stats), 2 * logits)
