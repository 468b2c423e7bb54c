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


# What a composition is predicted by: per nanosecond bytes that a GPU copies and operations of its products in float32
# without tensor cores, of an H200; and the host's microseconds for a launch, which a fake driver does not make.
COPIED_PER_NS = 4_000
FLOPS_PER_NS = 53_000
LAUNCH_US = 3


@dataclass(frozen=True)
class Composition:
    """A loss as torch's ops on float32 features that store every logit, beside its kernels: what forward and backward
    ask on a GPU. The host's times are of tests/kernels/fake_driver.py, without launches.

    Attributes:
        most_logits: so many at most are stored.
        host_us: the host's time.
        launches: kernels of torch that it runs.
        bytes_per_logit: read and written.
        products: of `[M, D]` and `[N, D]` features.
        kernels_host_us: the host's time where our kernels serve.
        kernels_launches: those, and what of torch runs beside them.
    """

    most_logits: int
    host_us: int
    launches: int
    bytes_per_logit: int
    products: int
    kernels_host_us: int
    kernels_launches: int

    def is_faster(self, num_logits: int, width: int) -> bool:
        """Whether the host is later with the kernels than with the composition and the device with what the composition
        moves and multiplies, one after the other: a pure function of shape, without a wait."""
        if not 0 < num_logits <= self.most_logits:
            return False
        saved_us = self.kernels_host_us - self.host_us + LAUNCH_US * (self.kernels_launches - self.launches)
        moved, multiplied = self.bytes_per_logit * num_logits, 2 * self.products * width * num_logits
        # in integers, which a compiled graph guards on
        return moved * FLOPS_PER_NS + multiplied * COPIED_PER_NS < 1000 * saved_us * COPIED_PER_NS * FLOPS_PER_NS
