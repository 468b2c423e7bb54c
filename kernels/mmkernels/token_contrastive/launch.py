"""Launch configurations of the token-contrastive kernels: a pure function of shape, dtype and architecture, so
all ranks agree.

GPU: none; compiled ahead of time for each architecture on 2026-11-20, not yet timed. `block_m` counts tokens.
"""

from mmkernels._launch import Launch, Table

# Programs that share the rows; each keeps column sums of its own, [programs, N], so no atomics are needed.
MAX_PROGRAMS = 132
# Pass 2 holds one [N, chunk * Q] buffer of dL/dS: 256 MiB of it, but never fewer tokens than keep a GEMM busy.
CHUNK_BYTES = 256 << 20
MIN_CHUNK_TOKENS = 1024
# Tokens of a row in a tile, a power of two: fewer are padded, of more block follows block. Q = 32 is the field's;
# of other blocks than these, some row of the table would spill.
MIN_BLOCK_Q, MAX_BLOCK_Q = 16, 32

TABLE: Table = {
    ("fwd", 2, 80): Launch(128, 64, 32, 8, 4),
    ("fwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("fwd", 2, 100): Launch(128, 64, 64, 8, 3),
    ("fwd", 4, 80): Launch(64, 128, 16, 8, 3),
    ("fwd", 4, 90): Launch(64, 128, 16, 8, 3),
    ("fwd", 4, 100): Launch(64, 128, 16, 8, 3),
    ("bwd", 2, 80): Launch(128, 64, 32, 8, 4),
    ("bwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("bwd", 2, 100): Launch(128, 128, 64, 8, 3),
    ("bwd", 4, 80): Launch(64, 128, 16, 8, 3),
    ("bwd", 4, 90): Launch(64, 128, 16, 8, 3),
    ("bwd", 4, 100): Launch(64, 128, 16, 8, 3),
}


def chunk_rows(num_tokens: int, num_cols: int, element_size: int) -> int:
    """Rows, of `num_tokens` each, whose dL/dS pass 2 holds at a time."""
    fitting = CHUNK_BYTES // max(num_cols * num_tokens * element_size, 1)
    return max(fitting, MIN_CHUNK_TOKENS // num_tokens, 1)
