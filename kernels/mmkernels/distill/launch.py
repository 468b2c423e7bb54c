"""Launch configurations of the distillation kernels: a pure function of dtype and architecture.

GPU: none; compiled ahead of time for each architecture on 2026-11-21, not yet timed.
"""

from mmkernels._launch import Launch, Table

# Programs that keep every processor's memory pipes full; fewer rows are cut along the classes.
MIN_PROGRAMS = 264

# A program walks a row, or a part of one, in blocks of block_n.
TABLE: Table = {
    (kernel, size, arch): Launch(1, 2048, 1, 8, 1)
    for kernel in ("fwd", "bwd")
    for size in (2, 4)
    for arch in (80, 90, 100)
}
