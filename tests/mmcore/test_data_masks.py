"""Masks over patches: exact counts, laws, every cell, grids and counts at their ends."""

import math
import random

import numpy as np
import pytest
import torch

from mmcore.data.transforms.masks import block_mask, coarse_mask, gather, hidden, random_mask, restore


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([7, *seed])


@pytest.mark.parametrize("ratio", [x / 20 for x in range(1, 20)])
@pytest.mark.parametrize("num", [4, 16, 49, 196, 256])
def test_a_random_mask_keeps_exactly_as_many_as_is_published(num: int, ratio: float) -> None:
    expected = int(num * (1 - ratio))
    if expected in (0, num):
        with pytest.raises(ValueError, match=f"random_mask: ratio must mask and leave .* {num} patches, got {ratio}"):
            random_mask(num, ratio, rng())
        return
    kept = random_mask(num, ratio, rng())
    assert kept.dtype == torch.int64 and kept.tolist() == sorted(set(kept.tolist())) and len(kept) == expected
    assert kept[0] >= 0 and kept[-1] < num
    assert torch.equal(kept, random_mask(num, ratio, rng())) and (
        num < 16 or not kept.equal(random_mask(num, ratio, rng(1)))
    )


def test_every_patch_is_kept_as_often() -> None:
    counts = sum(torch.zeros(16).index_fill(0, random_mask(16, 0.75, rng(i)), 1) for i in range(4000))
    assert isinstance(counts, torch.Tensor) and (counts / 4000 - 0.25).abs().max() < 0.03


def test_restore_of_gather_is_the_identity_and_the_rest_is_filler() -> None:
    x, filler = torch.randn(3, 16, 5, dtype=torch.float64, requires_grad=True), torch.randn(5)
    kept = torch.stack([random_mask(16, 0.75, rng(i)) for i in range(3)])
    full = restore(gather(x, kept), kept, filler, 16)
    masked = hidden(kept, 16)
    assert (masked.sum(1) == 12).all() and torch.equal(full[~masked], x[~masked])
    assert torch.equal(full[masked], filler.double().expand(36, 5))
    order = torch.stack([torch.randperm(16) for _ in x])
    assert torch.equal(restore(gather(x, order), order, filler, 16), x)
    assert torch.equal(restore(gather(x, kept), kept, x.detach(), 16), x)
    full.sum().backward()
    assert x.grad is not None and torch.equal(x.grad.bool().any(2), ~masked)


def published(grid: int, count: int, least: int, aspect: float, draw: random.Random) -> int:
    """How many BEiT's rule masks."""
    mask, done = np.zeros((grid, grid), dtype=bool), 0
    while done < count:
        for _ in range(10):
            area, shape = draw.uniform(least, count - done), math.exp(draw.uniform(math.log(aspect), -math.log(aspect)))
            h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if h >= grid or w >= grid:
                continue
            top, left = draw.randint(0, grid - h), draw.randint(0, grid - w)
            block = mask[top : top + h, left : left + w]
            new = block.size - int(block.sum())
            if 0 < new <= count - done:
                block[:] = True
                break
        else:
            break
        done = int(mask.sum())
    return done


def test_block_masks_follow_the_published_law_of_counts_and_reach_every_cell() -> None:
    masks = [block_mask((14, 14), 75, 16, 0.3, rng(i)) for i in range(400)]
    found = np.array([mask.sum() for mask in masks])
    wanted = np.array([published(14, 75, 16, 0.3, random.Random(i)) for i in range(400)])
    assert found.max() <= 75 and abs(found.mean() - wanted.mean()) < 1 and abs(found.std() - wanted.std()) < 1
    reached = np.mean(masks, axis=0)
    assert (
        reached.min() > 0.01
        and 0.5 < reached[-1].mean() / reached[0].mean() < 2 > reached[:, -1].mean() / reached[:, 0].mean()
    )


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (1, 9), (3, 5)])
def test_block_masks_end_on_small_grids_with_something_masked_and_something_left(grid: tuple[int, int]) -> None:
    num = grid[0] * grid[1]
    for count in range(1, num):
        for least in {1, count}:
            masks = [block_mask(grid, count, least, 0.3, rng(i)) for i in range(200)]
            assert all(1 <= mask.sum() <= count for mask in masks)
            assert np.any(masks, axis=0).all(), (count, least)


def test_coarse_masks_round_up_and_fill_cells() -> None:
    for ratio, expected in ((0.6, 22), (0.01, 1), (0.97, 35)):
        mask = coarse_mask((12, 12), 2, ratio, rng())
        cells = mask.reshape(6, 2, 6, 2)
        assert cells.any((1, 3)).sum() == cells.all((1, 3)).sum() == expected == math.ceil(ratio * 36)


@pytest.mark.parametrize(("draw", "sentence"), [
    (lambda: random_mask(16, 1.0, rng()), "random_mask: ratio must mask and leave at least one of 16 patches, got 1.0"),
    (lambda: random_mask(16, 0.0, rng()), "random_mask: ratio must .* got 0.0"),
    (lambda: random_mask(16, float("nan"), rng()), "random_mask: ratio must .* got nan"),
    (lambda: random_mask(16, -1.0, rng()), "random_mask: ratio must .* got -1.0"),
    (lambda: block_mask((1, 1), 1, 1, 0.3, rng()), "block_mask: count must mask and leave .* of 1 patches, got 1"),
    (lambda: block_mask((4, 4), 0, 1, 0.3, rng()), "block_mask: count must mask and leave .* of 16 patches, got 0"),
    (lambda: block_mask((4, 4), 16, 1, 0.3, rng()), "block_mask: count must .* got 16"),
    (lambda: block_mask((4, 4), 5, 17, 0.3, rng()), "block_mask: min_block must be from 1 to count 5, got 17"),
    (lambda: block_mask((4, 4), 5, 1, 0.0, rng()), "block_mask: aspect must be above 0 and at most 1, got 0.0"),
    (lambda: coarse_mask((6, 4), 3, 0.6, rng()), "coarse_mask: block must divide the grid of 6 x 4 patches, got 3"),
    (lambda: coarse_mask((4, 4), 4, 0.6, rng()), "coarse_mask: ratio must mask and leave .* of 1 cells, got 0.6"),
    (lambda: coarse_mask((4, 4), 2, 0.0, rng()), "coarse_mask: ratio must .* of 4 cells, got 0.0"),
])  # fmt: skip
def test_masks_of_nothing_or_of_all_are_refused_by_name_and_value(draw, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        draw()
