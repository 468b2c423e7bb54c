"""Launch configurations of the contrastive kernels: a pure function of dtype and architecture, so all ranks
agree.

GPU: none; compiled ahead of time for each architecture on 2026-11-21, not yet timed.
"""

from mmkernels._launch import Launch, Table

# Programs that share the rows; each keeps column sums of its own, [programs, N], so no atomics are needed.
MAX_PROGRAMS = 132

TABLE: Table = {
    ("fwd", 2, 80): Launch(128, 128, 32, 8, 4),
    ("fwd", 2, 90): Launch(128, 128, 32, 8, 4),
    ("fwd", 2, 100): Launch(64, 128, 64, 8, 3),
    ("fwd", 4, 80): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 90): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 100): Launch(128, 64, 16, 8, 3),
    ("bwd", 2, 80): Launch(128, 128, 32, 8, 4),
    ("bwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("bwd", 2, 100): Launch(128, 64, 64, 8, 3),
    ("bwd", 4, 80): Launch(128, 64, 16, 8, 3),
    ("bwd", 4, 90): Launch(128, 64, 16, 8, 3),
    ("bwd", 4, 100): Launch(128, 64, 16, 8, 3),
    # two products a tile: two accumulators
    ("fwd_teacher", 2, 80): Launch(64, 64, 32, 8, 3),
    ("fwd_teacher", 2, 90): Launch(64, 64, 64, 8, 3),
    ("fwd_teacher", 2, 100): Launch(64, 64, 32, 8, 3),
    ("fwd_teacher", 4, 80): Launch(64, 32, 16, 8, 3),
    ("fwd_teacher", 4, 90): Launch(64, 32, 16, 8, 3),
    ("fwd_teacher", 4, 100): Launch(64, 32, 16, 4, 3),
    ("bwd_teacher", 2, 80): Launch(64, 64, 32, 4, 3),
    ("bwd_teacher", 2, 90): Launch(64, 64, 64, 4, 3),
    ("bwd_teacher", 2, 100): Launch(64, 64, 64, 8, 3),
    ("bwd_teacher", 4, 80): Launch(64, 32, 16, 4, 3),
    ("bwd_teacher", 4, 90): Launch(64, 32, 16, 4, 3),
    ("bwd_teacher", 4, 100): Launch(64, 32, 16, 4, 3),
}
