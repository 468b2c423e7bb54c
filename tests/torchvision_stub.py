"""torchvision on a CPU build of torch: its compiled operators do not load there, and nothing here needs them."""

from importlib.util import find_spec

import pytest
import torch


def torchvision_or_skip() -> None:
    """Makes `import torchvision`, and what imports it, work; skips where it is not installed."""
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed (pip install --no-deps torchvision==0.28.0)")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, op):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_kept"] = library  # the operators live as long as it does
