"""The CPU's native step: C++ on LibTorch's stable ABI, where a compiler was there to build it.

`MMKERNELS_NATIVE=0` leaves it out, when the package is built as when it is imported.
"""

import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_native.so")
AVAILABLE: bool = LIBRARY.is_file() and os.environ.get("MMKERNELS_NATIVE") != "0"

if AVAILABLE:
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ImportError(
            f"mmkernels: {LIBRARY} must load with torch {torch.__version__}, got {error}; "
            "install mmkernels again to rebuild it, or set MMKERNELS_NATIVE=0 to do without"
        ) from error
