"""Launch configurations of the sigmoid loss's kernel: a pure function of dtype and architecture, so all ranks
agree.

GPU: none; compiled ahead of time for each architecture on 2026-11-21, not yet timed.
"""

from mmkernels._launch import Launch, Table

TABLE: Table = {
    ("fwd", 2, 80): Launch(128, 128, 32, 16, 4),
    ("fwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("fwd", 2, 100): Launch(128, 128, 64, 8, 3),
    ("fwd", 4, 80): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 90): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 100): Launch(128, 64, 32, 8, 3),
    # the comparison of labels takes registers
    ("fwd_labels", 2, 80): Launch(128, 128, 32, 16, 4),
    ("fwd_labels", 2, 90): Launch(128, 128, 64, 16, 3),
    ("fwd_labels", 2, 100): Launch(128, 64, 64, 8, 3),
    ("fwd_labels", 4, 80): Launch(128, 64, 16, 8, 3),
    ("fwd_labels", 4, 90): Launch(128, 64, 16, 8, 3),
    ("fwd_labels", 4, 100): Launch(128, 64, 32, 8, 3),
}
