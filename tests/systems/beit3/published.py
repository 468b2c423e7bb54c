"""torchscale's BEiT3 without fairscale and timm, which it pins to old versions and needs little of."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch


@contextmanager
def stubbed() -> Iterator[None]:
    """In float64 its softmax and GELU are computed in float32 else."""

    def wrapped(module: Any, *_: Any, **__: Any) -> Any:
        return module

    def softmax(x: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        return x.softmax(dim)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers"):
            module: Any = ModuleType(name)
            module.checkpoint_wrapper = module.wrap = module.drop_path = wrapped
            if name not in sys.modules:
                patch.setitem(sys.modules, name, module)
        patch.setattr(torch.Tensor, "float", lambda x: x)
        patch.setattr(torch.nn.functional, "softmax", softmax)
        yield


def beit3(**settings: Any) -> Any:
    """The model in evaluation mode and float64; skips the test where torchscale is not there."""
    pytest.importorskip(
        "torchscale", reason="torchscale 0.3.0 is not installed: pip install --no-deps torchscale==0.3.0"
    )
    from torchscale.architecture.config import EncoderConfig  # noqa: PLC0415 (under the stubs)
    from torchscale.model.BEiT3 import BEiT3  # noqa: PLC0415

    options = {"multiway": True, "layernorm_embedding": False, "normalize_output": True, "no_output_layer": True}
    return BEiT3(EncoderConfig(**{**options, **settings})).double().eval()
