"""Triton's interpreter, without the work that it does again for each call of a device function."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

COMPOUND = (tl.pointer_type, tl.block_type)
"""Types that cannot be hashed."""


@cache
def patch_language_once() -> None:
    """Puts the interpreter's forms in the places of `triton.language`'s functions for as long as the process lasts.

    The interpreter does so itself for each launch and each call of a device function, `tl.sum` too, and makes its table
    of dtypes for each operation: half of its time.
    """
    kernel: Any = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(kernel)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    made = interpreter._get_np_dtype
    known = cache(made)
    interpreter._get_np_dtype = lambda dtype: made(dtype) if isinstance(dtype, COMPOUND) else known(dtype)
