"""Which library multiplies matrices on this CPU: measured once a machine, in a few hundredths of a second.

No name of a processor decides. `MMKERNELS_PRODUCTS="float32=onednn bfloat16=avx512"` does, where it is set; else what
was measured here before, for this processor and this torch, in `mmkernels/products.json` of the user's cache; else it
is measured now. What torch does by itself is kept unless another way is faster by a quarter, so that noise changes
nothing from one process to the next.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels import native

VARIABLE = "MMKERNELS_PRODUCTS"
WAYS = {"float32": ("torch", "onednn"), "bfloat16": ("widened", "avx512", "amx")}
"""By dtype, the first what is always there. "torch" is `torch.mm`: MKL, where torch has it. "widened": bfloat16 in
float32. "avx512" and "amx": bfloat16 as it is, summed in float32, by our own kernel and by oneDNN's."""
SIZE = 384
MARGIN = 1.25


class Choice(NamedTuple):
    """The way taken for a dtype, why, and milliseconds of a product of [384, 384] on one thread by each way: of none
    that was not measured."""

    way: str
    why: str
    ms: dict[str, float]


def product_onednn(x: Tensor, y: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


def _product(x: Tensor, y: Tensor) -> Tensor:
    return torch.mm(x, y.T)


def product_bfloat16(way: str, x: Tensor, y: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """`out = x y^T`, or with `add` `out += x y^T`; x and y bfloat16, out float32."""
    torch.ops.mmkernels.product_bfloat16(x, y, out, add, way == "amx")
    return out


def available(dtype: str) -> tuple[str, ...]:
    """The ways that this machine has, of a torch whose capability is lowered fewer."""
    if dtype == "float32":
        is_wide = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
        return WAYS[dtype] if is_wide else WAYS[dtype][:1]
    ways = torch.ops.mmkernels.bfloat16_ways() if native.AVAILABLE else 0
    return ("widened", *(("avx512",) if ways & 1 else ()), *(("amx",) if ways & 2 else ()))


def chosen(dtype: str) -> Choice:
    has = available(dtype)
    said = _said().get(dtype)
    if said is not None:
        if said not in has:
            raise ValueError(f"{VARIABLE}: {dtype} must be one of {', '.join(has)} on this processor, got {said}")
        return Choice(said, f"{VARIABLE} says so", {})
    if len(has) == 1:
        return Choice(has[0], "there is no other way here", {})
    key = f"{_processor()}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {'/'.join(has)}"
    path = _cache()
    found = _read(path).get(dtype, {}).get(key)
    if found and has[0] in found and set(found) <= set(has):
        return Choice(_fastest(has, found), f"measured before, in {path}", found)
    ms = _measured(dtype, has)
    _write(path, dtype, key, ms)
    return Choice(_fastest(has, ms), "measured now", ms)


def _said() -> dict[str, str]:
    """What the environment says; a ValueError where that is no list of dtype=way."""
    said = {}
    for word in os.environ.get(VARIABLE, "").split():
        dtype, _, way = word.partition("=")
        if way not in WAYS.get(dtype, ()):
            known = " or ".join(f"{d}={'|'.join(w)}" for d, w in WAYS.items())
            raise ValueError(f"{VARIABLE} must be made of {known}, got {word}")
        said[dtype] = way
    return said


def _fastest(has: tuple[str, ...], ms: dict[str, float]) -> str:
    best = min((way for way in has if way in ms), key=ms.__getitem__)
    return best if ms[best] * MARGIN < ms[has[0]] else has[0]


def _measured(dtype: str, has: tuple[str, ...]) -> dict[str, float]:
    """Milliseconds of each way whose product is right: a library that is fast and wrong is not there."""
    count = torch.arange(SIZE * SIZE, dtype=torch.float32)
    x, y = (torch.sin(count * w).view(SIZE, SIZE) for w in (0.37, 0.71))
    out = torch.empty(SIZE, SIZE)
    if dtype == "float32":
        runs: dict[str, Callable[[], Tensor]] = {
            "torch": lambda: _product(x, y),
            "onednn": lambda: product_onednn(x, y),
        }
        right = runs["torch"]()
    else:
        low_x, low_y = x.bfloat16(), y.bfloat16()
        by_onednn = CHOICES["float32"].way == "onednn"
        runs = {"widened": lambda: (product_onednn if by_onednn else _product)(low_x.float(), low_y.float())}
        runs |= {way: (lambda way=way: product_bfloat16(way, low_x, low_y, out)) for way in ("avx512", "amx")}
        right = runs["widened"]()
    most, threads = 1e-4 * float(right.abs().max()), torch.get_num_threads()
    torch.set_num_threads(1)  # what other processes do to the other cores is no property of a library
    try:
        return {way: _best_ms(runs[way]) for way in has if float((runs[way]() - right).abs().max()) < most}
    finally:
        torch.set_num_threads(threads)


def _best_ms(run: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(5):
        began = time.thread_time()
        run()
        times.append(time.thread_time() - began)
    return round(1e3 * min(times), 4)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("vendor_id", "cpu family", "model\t", "stepping", "CPU implementer", "CPU part")
    found = {line.partition(":")[0]: line.partition(":")[2].strip() for line in lines if line.startswith(wanted)}
    return " ".join(found.values()) or "unknown"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mmkernels/products.json"


def _read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or a damaged one
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, dtype: str, key: str, ms: dict[str, float]) -> None:
    """Whole or not at all; where nothing may be written each process measures."""
    known = _read(path)
    known.setdefault(dtype, {})[key] = ms
    part = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(known, indent=1))
        part.replace(path)


CHOICES: dict[str, Choice] = {}
for _dtype in WAYS:  # of bfloat16 in float32 the way of float32 is one
    CHOICES[_dtype] = chosen(_dtype)
