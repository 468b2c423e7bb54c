"""Launch configurations of the multi-tensor kernels: the same for all dtypes, which a launch may mix.

GPU: none; compiled ahead of time for each architecture on 2026-11-21, not yet timed.
"""

from mmkernels._launch import Launch, Table
from mmkernels.multi_tensor.table import CHUNK

# A program takes a chunk, a thread 16 elements of it: of float32 four accesses of 16 bytes a list. Rows are of the
# table's int64, since a launch may mix dtypes.
KERNELS = (
    "ema_update",
    "adamw_update",
    "squares",
    "clip",
    "fisher_accumulate",
    "ewc_penalty_fwd",
    "ewc_penalty_bwd",
    "apply_masks",
)
TABLE: Table = {
    (kernel, 8, architecture): Launch(CHUNK, 16, 16, 8, 1) for kernel in KERNELS for architecture in (80, 90, 100)
}
