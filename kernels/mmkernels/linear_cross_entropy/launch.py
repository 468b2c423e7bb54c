"""Launch configurations of the linear cross-entropy's kernel: a pure function of dtype and architecture.

GPU: none; compiled ahead of time for each architecture on 2026-11-21, not yet timed.
"""

from mmkernels._launch import Launch, Table

# One [chunk, V] buffer holds the logits and then dL/dlogits: 256 MiB of it, but never fewer rows than keep
# the product for the weight, which reads and writes [V, D] in float32, from waiting for memory.
CHUNK_BYTES = 256 << 20
MIN_CHUNK, MAX_CHUNK = 1024, 8192

# A program owns a row, and walks it in blocks of block_n.
TABLE: Table = {("fwd", size, arch): Launch(1, 4096, 1, 8, 1) for size in (2, 4) for arch in (80, 90, 100)}


def chunk_rows(vocab: int) -> int:
    """Rows of float32 logits that are held at a time."""
    fitting = CHUNK_BYTES // (vocab * 4) // 128 * 128
    return min(max(fitting, MIN_CHUNK), MAX_CHUNK)
