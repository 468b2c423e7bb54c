"""An order of samples in which those of a step are alike."""

from collections.abc import Sequence

import torch

from mmcore.ops import require


def group_by_modality_length(
    lengths: Sequence[int], is_multimodal: Sequence[bool], batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Every index once, in LLaVA's order: runs of `world_size * batch_size` of one modality, a batch a rank in each.

    A rank's batches within a run have about the same length. What is left over of both modalities stands together:
    in the first run where it fills one, and at the end.

    Args:
        lengths: of each sample, at least 1.
        is_multimodal: of each sample, whether it has an image.
        batch_size: samples per rank and step, gradient accumulation included or not as the caller steps.
        world_size: number of ranks.
        generator: on the CPU, in the same state on all ranks.
    """
    op, least = "group_by_modality_length", min(lengths, default=0)
    fits = len(lengths) == len(is_multimodal) and (least >= 1 or not lengths)
    what = "lengths must be at least 1 for each of {} samples, got {}, the least {}"
    require(op, fits, what, len(is_multimodal), len(lengths), least)
    what = "batch_size and world_size must be at least 1, got {} and {}"
    require(op, batch_size >= 1 and world_size >= 1, what, batch_size, world_size)
    size = batch_size * world_size
    runs: list[list[int]] = []
    rest: list[int] = []
    for modality in (True, False):
        indices = [i for i, has_image in enumerate(is_multimodal) if bool(has_image) == modality]
        shuffled = torch.randperm(len(indices), generator=generator).tolist()
        starts = range(0, len(shuffled), size)
        own = [_by_rank([indices[i] for i in shuffled[at : at + size]], lengths, world_size) for at in starts]
        runs += own[:-1]
        rest += own[-1] if own else []
    runs = [runs[i] for i in torch.randperm(len(runs), generator=generator).tolist()]
    first = size if len(rest) >= size else 0
    return [i for run in (rest[:first], *runs, rest[first:]) for i in run]


def _by_rank(run: list[int], lengths: Sequence[int], world_size: int) -> list[int]:
    """A run with the batches of its ranks one after the other, their lengths' sums about equal."""
    run = sorted(run, key=lambda i: lengths[i], reverse=True)
    if len(run) % world_size:
        return [i for rank in range(world_size) for i in run[rank::world_size]]
    batches: list[list[int]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for i in run:
        open_ranks = [r for r in range(world_size) if len(batches[r]) < len(run) // world_size]
        rank = min(open_ranks, key=lambda r: totals[r])
        batches[rank].append(i)
        totals[rank] += lengths[i]
    return [i for batch in batches for i in batch]
