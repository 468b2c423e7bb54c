"""Launch configurations of the attention kernels: a pure function of shape, dtype and architecture, so all ranks
agree.

GPU: none; compiled ahead of time for each architecture on 2026-11-21, not yet timed. A row's name ends in the
largest head dimension that it serves, which is its `block_d`; a rich row serves calls with any extra.
"""

import triton
from torch import Tensor

from mmkernels._launch import Launch, Table, architecture, launch_config
from mmkernels.attention.problem import Problem, is_rich

# Programs are cut along the keys until there are this many for each processor.
PROGRAMS_PER_PROCESSOR = 1.5
PROCESSORS = {80: 108, 90: 132, 100: 148}
# The interpreter's, so that small tests cross the edges of splits.
INTERPRETED_PROCESSORS = 16
MAX_SPLITS = 64

TABLE: Table = {
    ("fwd_64", 2, 80): Launch(128, 128, 64, 8, 3),
    ("fwd_64", 2, 90): Launch(128, 128, 64, 8, 3),
    ("fwd_64", 2, 100): Launch(128, 128, 64, 8, 3),
    ("fwd_64", 4, 80): Launch(64, 32, 64, 8, 2),
    ("fwd_64", 4, 90): Launch(64, 32, 64, 8, 2),
    ("fwd_64", 4, 100): Launch(64, 64, 64, 8, 2),
    ("fwd_128", 2, 80): Launch(64, 64, 128, 4, 3),
    ("fwd_128", 2, 90): Launch(128, 64, 128, 8, 3),
    ("fwd_128", 2, 100): Launch(128, 64, 128, 8, 3),
    ("fwd_128", 4, 80): Launch(32, 32, 128, 8, 1),
    ("fwd_128", 4, 90): Launch(64, 64, 128, 8, 2),
    ("fwd_128", 4, 100): Launch(64, 64, 128, 8, 2),
    ("fwd_256", 2, 80): Launch(64, 64, 256, 8, 2),
    ("fwd_256", 2, 90): Launch(64, 64, 256, 8, 2),
    ("fwd_256", 2, 100): Launch(64, 64, 256, 8, 2),
    ("fwd_256", 4, 80): Launch(16, 16, 256, 8, 1),
    ("fwd_256", 4, 90): Launch(32, 32, 256, 8, 2),
    ("fwd_256", 4, 100): Launch(32, 32, 256, 8, 2),
    ("fwd_rich_64", 2, 80): Launch(64, 64, 64, 8, 2),
    ("fwd_rich_64", 2, 90): Launch(128, 64, 64, 8, 3),
    ("fwd_rich_64", 2, 100): Launch(128, 64, 64, 8, 3),
    ("fwd_rich_64", 4, 80): Launch(32, 32, 64, 8, 2),
    ("fwd_rich_64", 4, 90): Launch(16, 16, 64, 8, 1),
    ("fwd_rich_64", 4, 100): Launch(16, 32, 64, 8, 1),
    ("fwd_rich_128", 2, 80): Launch(64, 64, 128, 8, 2),
    ("fwd_rich_128", 2, 90): Launch(64, 32, 128, 8, 2),
    ("fwd_rich_128", 2, 100): Launch(64, 32, 128, 8, 2),
    ("fwd_rich_128", 4, 80): Launch(32, 32, 128, 8, 1),
    ("fwd_rich_128", 4, 90): Launch(16, 32, 128, 8, 1),
    ("fwd_rich_128", 4, 100): Launch(16, 32, 128, 8, 1),
    ("fwd_rich_256", 2, 80): Launch(64, 16, 256, 8, 1),
    ("fwd_rich_256", 2, 90): Launch(64, 16, 256, 8, 1),
    ("fwd_rich_256", 2, 100): Launch(64, 16, 256, 8, 1),
    ("fwd_rich_256", 4, 80): Launch(16, 32, 256, 8, 1),
    ("fwd_rich_256", 4, 90): Launch(32, 32, 256, 8, 1),
    ("fwd_rich_256", 4, 100): Launch(32, 32, 256, 8, 1),
    ("bwd_q_64", 2, 80): Launch(128, 64, 64, 8, 2),
    ("bwd_q_64", 2, 90): Launch(128, 64, 64, 8, 2),
    ("bwd_q_64", 2, 100): Launch(128, 64, 64, 8, 2),
    ("bwd_q_64", 4, 80): Launch(64, 32, 64, 8, 2),
    ("bwd_q_64", 4, 90): Launch(64, 32, 64, 8, 2),
    ("bwd_q_64", 4, 100): Launch(64, 32, 64, 8, 2),
    ("bwd_q_128", 2, 80): Launch(64, 64, 128, 8, 2),
    ("bwd_q_128", 2, 90): Launch(64, 64, 128, 8, 2),
    ("bwd_q_128", 2, 100): Launch(64, 64, 128, 8, 2),
    ("bwd_q_128", 4, 80): Launch(16, 16, 128, 8, 1),
    ("bwd_q_128", 4, 90): Launch(32, 32, 128, 8, 2),
    ("bwd_q_128", 4, 100): Launch(64, 32, 128, 8, 2),
    ("bwd_q_256", 2, 80): Launch(64, 64, 256, 8, 2),
    ("bwd_q_256", 2, 90): Launch(64, 64, 256, 8, 2),
    ("bwd_q_256", 2, 100): Launch(64, 64, 256, 8, 2),
    ("bwd_q_rich_64", 2, 80): Launch(64, 16, 64, 8, 1),
    ("bwd_q_rich_64", 2, 90): Launch(64, 64, 64, 8, 2),
    ("bwd_q_rich_64", 2, 100): Launch(128, 64, 64, 8, 2),
    ("bwd_q_rich_64", 4, 80): Launch(32, 32, 64, 8, 2),
    ("bwd_q_rich_64", 4, 90): Launch(32, 32, 64, 8, 2),
    ("bwd_q_rich_64", 4, 100): Launch(32, 32, 64, 8, 2),
    ("bwd_q_rich_128", 2, 80): Launch(64, 32, 128, 8, 2),
    ("bwd_q_rich_128", 2, 90): Launch(64, 32, 128, 8, 2),
    ("bwd_q_rich_128", 2, 100): Launch(64, 32, 128, 8, 2),
    ("bwd_q_rich_256", 2, 80): Launch(64, 16, 256, 8, 1),
    ("bwd_q_rich_256", 2, 90): Launch(32, 32, 256, 8, 1),
    ("bwd_q_rich_256", 2, 100): Launch(32, 32, 256, 8, 1),
    ("bwd_k_64", 2, 80): Launch(32, 64, 64, 8, 1),
    ("bwd_k_64", 2, 90): Launch(64, 64, 64, 8, 2),
    ("bwd_k_64", 2, 100): Launch(64, 64, 64, 8, 2),
    ("bwd_k_64", 4, 80): Launch(32, 32, 64, 8, 2),
    ("bwd_k_64", 4, 90): Launch(32, 32, 64, 8, 2),
    ("bwd_k_64", 4, 100): Launch(32, 32, 64, 8, 2),
    ("bwd_k_128", 2, 80): Launch(32, 64, 128, 8, 2),
    ("bwd_k_128", 2, 90): Launch(32, 64, 128, 8, 2),
    ("bwd_k_128", 2, 100): Launch(32, 32, 128, 8, 1),
    ("bwd_k_128", 4, 80): Launch(32, 32, 128, 8, 1),
    ("bwd_k_128", 4, 90): Launch(16, 16, 128, 8, 1),
    ("bwd_k_128", 4, 100): Launch(16, 32, 128, 8, 1),
    ("bwd_k_256", 2, 80): Launch(32, 32, 256, 8, 1),
    ("bwd_k_256", 2, 90): Launch(32, 32, 256, 8, 1),
    ("bwd_k_256", 2, 100): Launch(32, 32, 256, 8, 1),
    ("bwd_k_rich_64", 2, 80): Launch(16, 64, 64, 8, 1),
    ("bwd_k_rich_64", 2, 90): Launch(32, 64, 64, 8, 2),
    ("bwd_k_rich_64", 2, 100): Launch(32, 64, 64, 8, 2),
    ("bwd_k_rich_64", 4, 80): Launch(32, 32, 64, 8, 2),
    ("bwd_k_rich_64", 4, 90): Launch(32, 64, 64, 8, 2),
    ("bwd_k_rich_64", 4, 100): Launch(32, 32, 64, 8, 2),
    ("bwd_k_rich_128", 2, 80): Launch(32, 32, 128, 8, 1),
    ("bwd_k_rich_128", 2, 90): Launch(16, 64, 128, 8, 1),
    ("bwd_k_rich_128", 2, 100): Launch(32, 64, 128, 8, 1),
    ("bwd_k_rich_256", 2, 80): Launch(32, 16, 256, 8, 1),
    ("bwd_k_rich_256", 2, 90): Launch(32, 16, 256, 8, 1),
    ("bwd_k_rich_256", 2, 100): Launch(32, 16, 256, 8, 1),
}


def config_of(kernel: str, problem: Problem) -> Launch:
    """Of the "fwd", the "bwd_q" or the "bwd_k" kernel."""
    q = problem.q
    size = 64 if q.shape[3] <= 64 else 128 if q.shape[3] <= 128 else 256
    return launch_config(TABLE, f"{kernel}{'_rich' if is_rich(problem) else ''}_{size}", q)


def split_keys(num_programs: int, num_keys: int, block_n: int, x: Tensor) -> int:
    """Keys of a split, whole tiles: few programs alone would leave processors idle."""
    processors = PROCESSORS[architecture(x.device)] if x.is_cuda else INTERPRETED_PROCESSORS
    wanted = int(PROGRAMS_PER_PROCESSOR * processors) // max(num_programs, 1)
    tiles = max(triton.cdiv(num_keys, block_n), 1)
    return int(triton.cdiv(tiles, min(max(wanted, 1), MAX_SPLITS, tiles))) * block_n
