"""What apply_masks_ promises beyond the contract that every op obeys."""

import pytest
import torch
from torch import Tensor

from mmkernels import apply_masks_
from mmkernels.multi_tensor.table import CHUNK

SIZES = [1, CHUNK, 300, 0, 4103]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float64: torch.int64}


def bits(dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Any bits: every NaN that there is, and infinity."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(BITS[dtype])
    return [torch.randint(info.min, info.max, (n,), generator=generator, dtype=BITS[dtype]).view(dtype) for n in SIZES]


def owners(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for n in SIZES]


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_what_is_kept_keeps_its_bits_and_the_rest_is_zero_whatever_it_was(dtype: torch.dtype, path: str) -> None:
    found, masks = bits(dtype, 0), [x > 100 for x in owners(1)]
    expected = [x.view(BITS[dtype]) * mask for x, mask in zip(found, masks, strict=True)]
    apply_masks_(found, masks)
    for x, gold in zip(found, expected, strict=True):
        assert torch.equal(x.view(BITS[dtype]), gold)


@pytest.mark.parametrize("kept", [(0, 0), (1, 3), (2, 2), (0, 255), (200, 255), (255, 255)])
def test_what_belongs_to_these_tasks_is_kept(kept: tuple[int, int], path: str) -> None:
    found, masks = bits(torch.float32, 0), owners(1)
    expected = [
        x.view(torch.int32) * ((kept[0] <= mask) & (mask <= kept[1])) for x, mask in zip(found, masks, strict=True)
    ]
    apply_masks_(found, masks, owners=kept)
    assert all(torch.equal(x.view(torch.int32), y) for x, y in zip(found, expected, strict=True))


def test_a_table_of_masks_in_bool_is_not_one_of_owners() -> None:
    x, masks = [torch.ones(4)], [torch.ones(4, dtype=torch.bool)]
    apply_masks_(x, masks)
    with pytest.raises(ValueError, match=r"masks\[0\] must be uint8 with owners, got torch.bool"):
        apply_masks_(x, masks, owners=(1, 1))
