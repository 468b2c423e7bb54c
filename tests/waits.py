"""Where our code reads tensors on the host, which waits for the device that they are on."""

import sys
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {getattr(Tensor, name) for name in "item tolist cpu numpy nonzero __bool__ __int__ __float__ __index__".split()}
UPLOADS = {torch.tensor, torch.as_tensor}
"""Of numbers to a device: from memory that is not pinned, which waits for it too."""
ON_HOST = ("mmcore/optim/base.py", "mmcore/nn/packing.py", "mmcore/systems/clip/model.py", "multi_tensor/table.py")
"""Counts of steps, lengths of captions, addresses: made on the host, and kept there."""


class Waits(TorchFunctionMode):
    """Counts reads of tensors, and uploads if asked to, by the line of a package that makes them."""

    def __init__(self, package: str = "mmcore", counts_uploads: bool = False) -> None:
        super().__init__()
        # not by the name alone: the folder of a clone may have it too
        self.folder = f"{Path(str(import_module(package).__file__)).parent}/"
        self.package, self.uploads = package, UPLOADS if counts_uploads else set()
        self.lines: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        # a device that a literal does not name is that of the tensors
        if func in READS or (func in self.uploads and (kwargs or {}).get("device") not in (None, "cpu")):
            frame: Any = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            file = frame.f_code.co_filename
            if file.startswith(self.folder) and not file.endswith(ON_HOST):
                self.lines[f"{self.package}/{file.removeprefix(self.folder)}:{frame.f_lineno}"] += 1
        return func(*args, **(kwargs or {}))
