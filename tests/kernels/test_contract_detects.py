"""The contract turns red for planted bugs: each is one edit of a path's source."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmkernels._contract import check
from mmkernels._device import INTERPRETED
from mmkernels.contrastive import blockwise, kernel, op
from mmkernels.contrastive.spec import LOSS, STATS

BLOCKWISE = {
    "wrong factor on da": (
        "da.addcmul_(b[of_positives], coef).mul_(alpha)",
        "da.addcmul_(b[of_positives], coef)",
    ),
    "wrong factor on logits": ("matmul_nt(a_tile, b_tile).mul_(alpha)", "matmul_nt(a_tile, b_tile)"),
    "unwritten column": ("for c in range(0, num_cols, cols)", "for c in range(0, num_cols - 1, cols)"),
    "missing cast": ("return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)", "return x"),
    "sums not rescaled to the new maximum": ("mul_(running_max.sub_(new_max).exp_())", "mul_(1)"),
    "positive counted twice": ("            diagonal.zero_()\n", ""),
    "column share of the positive lost": ("from_rows.add_(from_cols)", "from_rows"),
    "upstream gradient of columns ignored": ("col_coef = d_col *", "col_coef = 0 * d_col *"),
    "offset ignored in db": ("db[of_positives].addcmul_", "db[:num_rows].addcmul_"),
    "mean of the scale's gradient lost": ("dscale *= center", "dscale *= 0"),
}
KERNEL = {
    "wrong factor on da": ("da[rows] = product.mul_(scale)", "da[rows] = product"),
    "wrong factor on logits": ("            logits = acc * scale\n", "            logits = acc\n"),
    "unwritten column": (
        "tl.store(col_sum_ptr + col_base + offs_n, col_sum, mask=mask_n)",
        "tl.store(col_sum_ptr + col_base + offs_n, col_sum, mask=offs_n < N - 1)",
    ),
    # rounding the logits stands for an accumulator of the operands' dtype, which the interpreter ignores
    "missing cast": (
        "            logits = acc * scale\n",
        "            logits = (acc * scale).to(tl.float16).to(tl.float32)\n",
    ),
    "rows outside counted in column sums": (
        "tl.where(mask_m[:, None], logits, float",
        "tl.where(True, logits, float",
    ),
    "columns outside counted in row sums": (
        "tl.where(mask_n[None, :], logits, float",
        "tl.where(True, logits, float",
    ),
    "sums not rescaled to the new maximum": ("row_sum * tl.exp(row_max - new_max)", "row_sum"),
    "positive counted twice": ("tl.where(is_positive, 0.0, grad)", "grad"),
    "gradient's unit not taken back": ("_matmul(part, b).div_(unit)", "_matmul(part, b)"),
    "second chunk's offset forgotten": ("                first + offset,\n", "                offset,\n"),
    "one split's columns skipped": (
        "first_n = pid_n * cols_per_split",
        "first_n = pid_n * cols_per_split + pid_n",
    ),
}
PLANTS = KERNEL if INTERPRETED or torch.cuda.is_available() else BLOCKWISE
TILING = ("TILE", "MAX_PROGRAMS", "chunk_rows")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((STATS, STATS.shapes[1]), (STATS, STATS.shapes[-1]), (LOSS, LOSS.shapes[-1]))


def contract() -> None:
    for spec, shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            check(spec, shape, "random", dtype, DEVICE, seeds=range(2))


pytestmark = pytest.mark.usefixtures("streamed")


def plant(path: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The path's module again, from its source with one text replaced."""
    source = Path(str(path.__file__)).read_text()
    assert source.count(old) >= 1, "the planted bug has lost its place in the source"
    file = folder / "planted.py"
    file.write_text(source.replace(old, new))
    module_spec = importlib.util.spec_from_file_location("planted", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    # the streamed fixture has made the path's own tiles small
    vars(module).update({name: vars(path)[name] for name in TILING if name in vars(path)})
    return module


def test_the_contract_is_green_without_a_plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the same machinery, so that red below is the plant's doing; in chunks and tiles of 32."""
    path, name = (kernel, "kernel") if PLANTS is KERNEL else (blockwise, "blockwise")
    monkeypatch.setattr(op, name, plant(path, "import torch", "import torch", tmp_path))
    contract()


@pytest.mark.parametrize("bug", PLANTS)
def test_the_contract_turns_red_for(bug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, name = (kernel, "kernel") if PLANTS is KERNEL else (blockwise, "blockwise")
    monkeypatch.setattr(op, name, plant(path, *PLANTS[bug], tmp_path))
    with pytest.raises(AssertionError, match=r"bound|shape"):
        contract()
