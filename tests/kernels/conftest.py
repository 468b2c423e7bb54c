"""Small tiles for small tests, and a skip, with its reason, of what needs a CUDA device."""

from importlib import import_module

import pytest
import torch

from mmkernels import _tile, native
from mmkernels._cost import Composition
from mmkernels._device import INTERPRETED
from mmkernels.attention import blockwise as attention_blockwise
from mmkernels.attention import op as attention_op
from mmkernels.attention import pieces
from mmkernels.contrastive import blockwise, eager, kernel, launches, op, problem
from mmkernels.distill import blockwise as distill_blockwise
from mmkernels.distill import eager as distill_eager
from mmkernels.distill import kernel as distill_kernel
from mmkernels.linear_cross_entropy import blockwise as lce_blockwise
from mmkernels.linear_cross_entropy import eager as lce_eager
from mmkernels.linear_cross_entropy import kernel as lce_kernel
from mmkernels.maxsim import blockwise as maxsim_blockwise
from mmkernels.maxsim import eager as maxsim_eager
from mmkernels.maxsim import kernel as maxsim_kernel
from mmkernels.multi_tensor import blockwise as multi_tensor_blockwise
from mmkernels.sigmoid import blockwise as sigmoid_blockwise
from mmkernels.sigmoid import eager as sigmoid_eager
from mmkernels.sigmoid import kernel as sigmoid_kernel
from mmkernels.token_contrastive import blockwise as token_blockwise
from mmkernels.token_contrastive import eager as token_eager
from mmkernels.token_contrastive import kernel as token_kernel

if INTERPRETED:
    import_module("tests.kernels.interpreter").patch_language_once()

# by module: what lets torch's ops take the place of kernels on a GPU
NEVER = Composition(0, 0, 0, 0, 0, 0, 0)
COMPOSED = {
    eager: {"OF_PAIRS": NEVER, "OF_VARIANTS": NEVER}, sigmoid_eager: {"ON_GPU": NEVER}, token_eager: {"ON_GPU": NEVER},
}  # fmt: skip
# by module: what makes small shapes cross tiles, chunks, splits and programs, as large ones do
SMALL = {
    attention_blockwise: {"TILE_ROWS": 8, "TILE_COLS": 16, "TILE_WEIGHTS": 512, "MASKED_ROWS": 16},
    attention_op: {"FEW_WEIGHTS": 0}, pieces: {"MIN_ROWS": 4, "MIN_COLS": 4, "MASK_ENTRIES": 256},
    blockwise: {"TILE": 32},
    kernel: {"MAX_LOGITS": 2000, "chunk_rows": lambda num_cols, element_size: 32}, op: {"STORED_LOGITS": 0},
    launches: {"FEW_LOGITS": 0},
    problem: {"POSITIVES_CHUNK": 24}, distill_blockwise: {"BLOCK": 256}, distill_kernel: {"MIN_PROGRAMS": 6},
    distill_eager: {"EAGER_LOGITS": 0}, multi_tensor_blockwise: {"PART": 64}, sigmoid_blockwise: {"TILE": 32},
    sigmoid_kernel: {"chunk_rows": lambda num_cols, element_size: 32},
    sigmoid_eager: {"EAGER_LOGITS": 0, "STORED_LOGITS": 0},
    lce_blockwise: {"ROWS": 32, "COLS": 32}, lce_kernel: {"chunk_rows": lambda vocab, memory: 32, "AHEAD": 16},
    maxsim_blockwise: {"TILE": 900}, maxsim_kernel: {"MIN_PROGRAMS": 24}, maxsim_eager: {"EAGER_PRODUCTS": 0},
    lce_eager: {"EAGER_PRODUCT": 0}, token_eager: {"EAGER_PRODUCTS": 0, "STORED_PRODUCTS": 0},
    token_blockwise: {"TILE": 640, "TILE_COLS": 16},
    token_kernel: {"CHUNK_BYTES": 2048, "chunk_rows": lambda num_tokens, num_cols, element_size: 5},
}  # fmt: skip


@pytest.fixture
def streamed(kernels_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, values in SMALL.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


@pytest.fixture
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU no composition of torch's ops, at any shape."""
    for module, values in COMPOSED.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


# the interpreter runs the kernels alone
@pytest.fixture(params=["streamed"] if INTERPRETED else ["streamed", "eager_form"])
def either_form(request: pytest.FixtureRequest) -> str:
    """Small shapes both ways: streamed in small tiles, and by the eager form that a CPU takes there."""
    if request.param == "streamed":
        request.getfixturevalue("streamed")
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["aten", "native"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two ways in which a CPU does elementwise work; under the interpreter Triton does most of it."""
    if request.param == "aten":
        monkeypatch.setattr(native, "AVAILABLE", False)
        monkeypatch.setattr(_tile, "BLOCK", 200)  # so that small tiles are several blocks
    elif INTERPRETED:
        pytest.skip("Triton serves this process")
    elif not native.AVAILABLE:
        pytest.skip("the native step is not built: python setup.py build_ext --inplace")
    return request.param


@pytest.fixture
def aten_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ATen twins of the native steps: they are what a bug can be planted in without a compiler."""
    monkeypatch.setattr(native, "AVAILABLE", False)
