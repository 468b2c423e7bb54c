"""Where our code reads tensors on the host, which waits for the device that they are on."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {getattr(Tensor, name) for name in "item tolist cpu numpy nonzero __bool__ __int__ __float__ __index__".split()}
ON_HOST = ("mmcore/optim/base.py", "mmcore/nn/packing.py", "mmcore/systems/clip/model.py")
"""Counts of steps, lengths of captions: made on the host, and kept there."""


class Waits(TorchFunctionMode):
    """Counts reads of tensors, by the line of mmcore that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in READS:
            frame: Any = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            file = frame.f_code.co_filename
            if "/mmcore/" in file and not file.endswith(ON_HOST):
                self.lines[f"mmcore/{file.split('/mmcore/')[-1]}:{frame.f_lineno}"] += 1
        return func(*args, **(kwargs or {}))
