"""Lists of tensors for the tests of what walks them."""

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
ALL = (torch.float32, *HALVES)


def tensors(sizes: list[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(dtype) for n in sizes]
