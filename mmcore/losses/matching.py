"""Image-text matching: pairs that are hard to tell from right ones, drawn from the batches of all ranks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcore.losses.ranks import Group, gather_rows, global_mean, world_size_of
from mmcore.ops import require

# Similarities of a token that are held at a time: 64 MiB of float32.
MAX_HELD = 1 << 24


class Negatives(NamedTuple):
    """Numbers of rows of the global batch, int64 `[m]`, -1 where every other pair is right too."""

    images: Tensor  # a wrong image for each own text
    texts: Tensor  # a wrong text for each own image


@torch.no_grad()
def hard_negatives(
    tokens: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    image_ids: Tensor,
    text_ids: Tensor,
    generator: torch.Generator,
    momentum: tuple[Tensor, Tensor] | None = None,
    least: float = 0.0,
    group: Group = None,
) -> Negatives:
    """Draws a wrong image for each text and a wrong text for each image, with the probability that the softmax over
    `S_ij = logit_scale * max_q <tokens_iq, b_j>` of the global batch gives them (arXiv:2107.07651, arXiv:2301.12597).

    Pairs of the same image, or of the same text, are right, on whichever ranks they are, and never drawn.

    Args:
        tokens: features `[m, Q, D]` of this rank's images, all ranks' of one Q and D.
        b: features `[m, D]` of their texts.
        logit_scale: the multiplier itself.
        image_ids, text_ids: int64 `[m]`, equal for equal images or texts.
        generator: of the draws, on the CPU; of a seed of its own on each rank.
        momentum: features `[m, D]` of the same images and texts by a momentum encoder: images are then compared with
            its texts, and texts with its images (ALBEF, BLIP).
        least: what is added to each probability before the draw, at least 0; BLIP's is 1e-4.
        group: the data-parallel process group.
    """
    op, size = "hard_negatives", len(tokens)
    require(op, least >= 0, "least must be at least 0, got {}", least)
    for name, x in (("image_ids", image_ids), ("text_ids", text_ids)):
        fits = x.dtype == torch.int64 and list(x.shape) == [size]
        require(op, fits, "{} must be int64 [{}], got {} {}", name, size, x.dtype, list(x.shape))
    counts = row_counts(size, tokens.device, group)
    all_b, all_images, all_texts = (gather_rows(x, counts, group) for x in (b, image_ids, text_ids))
    is_right = (image_ids[:, None] == all_images) | (text_ids[:, None] == all_texts)
    if momentum is None:
        own = _similarities(tokens, all_b) * logit_scale  # [m, N]
        first = first_row(counts, group)
        of_texts = gather_rows(own, counts, group)[:, first : first + size].T  # [m, N]
    else:
        images_m, texts_m = (gather_rows(x, counts, group) for x in momentum)
        own = _similarities(tokens, texts_m) * logit_scale
        of_texts = _similarities(b[:, None], images_m) * logit_scale
    of_texts, own = (x if least == 0 else (x.softmax(1) + least).log() for x in (of_texts, own))
    return Negatives(_drawn(of_texts, is_right, generator), _drawn(own, is_right, generator))


@torch.no_grad()
def pair_labels(image_ids: Tensor, text_ids: Tensor, group: Group = None) -> Tensor:
    """Labels of this rank's pairs, int64 `[m]`: equal for those that share an image or a text, or are joined by such
    pairs, on whichever ranks they are."""
    counts = row_counts(len(image_ids), image_ids.device, group)
    keys = [gather_rows(ids, counts, group).unique(return_inverse=True)[1] for ids in (image_ids, text_ids)]
    labels = torch.arange(len(keys[0]), device=image_ids.device)
    while True:
        before = labels
        for key in keys:
            least = torch.full_like(labels, len(labels)).scatter_reduce(0, key, labels, "amin")
            labels = least[key]
        if torch.equal(labels, before):
            first = first_row(counts, group)
            return labels[first : first + len(image_ids)]


def row_counts(size: int, device: torch.device, group: Group) -> tuple[int, ...]:
    if world_size_of(group) == 1:
        return (size,)
    own = torch.tensor([size], device=device)
    return tuple(gather_rows(own, (1,) * world_size_of(group), group).tolist())


def first_row(counts: tuple[int, ...], group: Group) -> int:
    """The number in the global batch of this rank's first row."""
    return sum(counts[: dist.get_rank(group)]) if len(counts) > 1 else 0


def fetch_rows(x: Tensor, index: Tensor, group: Group = None) -> Tensor:
    """Rows of the global batch by number, from the ranks that have them; each travels to those alone that asked for it,
    and so does its gradient, back. Every rank makes the same calls, and their backwards.

    Args:
        x: `[m, ...]`, this rank's rows.
        index: int64 `[R]`; R and m may differ by rank.

    Returns:
        `[R, ...]`.
    """
    if world_size_of(group) == 1:
        return x[index]
    with torch.no_grad():
        asked, order, sizes = _requests(len(x), index, group)
    return _Exchanged.apply(x[asked], sizes, group)[order]  # pyright: ignore[reportIndexIssue]


def _requests(size: int, index: Tensor, group: Group) -> tuple[Tensor, Tensor, tuple[list[int], list[int]]]:
    """Which of this rank's `size` rows the others ask for, in the order of the ranks; where what comes back for
    `index` belongs; how many rows go to each rank and come from it."""
    counts = row_counts(size, index.device, group)
    starts = torch.tensor(counts, device=index.device).cumsum(0) - torch.tensor(counts, device=index.device)
    owner = torch.bucketize(index, starts, right=True) - 1
    # ranks without rows begin where their successors do, and own nothing
    order = owner.argsort(stable=True)
    wanted = torch.bincount(owner, minlength=len(counts))
    asked = torch.empty_like(wanted)
    dist.all_to_all_single(asked, wanted, group=group)
    sizes = asked.tolist(), wanted.tolist()
    rows = index.new_empty(sum(sizes[0]))
    dist.all_to_all_single(rows, (index - starts[owner])[order], *sizes, group=group)
    return rows, order.argsort(), sizes


class _Exchanged(torch.autograd.Function):
    """Rows sent to the ranks and received from them; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[list[int], list[int]], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _exchange(x, *sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        to, of = ctx.sizes
        return _exchange(grad, of, to, ctx.group), None, None


def _exchange(x: Tensor, to: list[int], of: list[int], group: Group) -> Tensor:
    found = x.new_empty(sum(of), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), of, to, group=group)
    return found


def global_ratio(total: Tensor, count: Tensor, group: Group = None) -> Tensor:
    """The sum of the ranks' totals `[]` over that of their counts `[]`, 0 without any; the total's gradient as in
    `global_mean`."""
    counted = count.detach().to(total.dtype)
    if world_size_of(group) == 1:
        return total / counted.clamp(min=1)
    counted = counted.clone()
    dist.all_reduce(counted, group=group)
    return global_mean(total / counted.clamp(min=1), group)


class MatchingRows(NamedTuple):
    """Right pairs of this rank, then each text with a wrong image, then each image with a wrong text; R in all."""

    more: Tensor  # states [M, ...] of other ranks' images
    image_index: Tensor  # int64 [R], the image of each pair among this rank's m and the M
    texts: tuple[Tensor, ...]  # each [R, ...]
    is_match: Tensor  # bool [R]


def matching_rows(negatives: Negatives, states: Tensor, texts: Sequence[Tensor], group: Group = None) -> MatchingRows:
    """Right and wrong pairs for `matching_loss`; a rank fetches the images and texts that others have. Pairs without a
    negative are left out of the wrong ones.

    Args:
        negatives: of `hard_negatives`.
        states: `[m, ...]` of this rank's images.
        texts: tensors `[m, ...]` of this rank's texts, such as tokens and lengths, each rank's of one padding.
        group: the data-parallel process group.
    """
    own = torch.arange(len(states), device=states.device)
    # -1 where no negative was found
    of_text, of_image = own[negatives.images >= 0], own[negatives.texts >= 0]
    more, wrong = _images_to_fetch(states, negatives.images[of_text], group)
    fetched = [fetch_rows(x, negatives.texts[of_image], group) for x in texts]
    rows = tuple(torch.cat([x, x[of_text], y]) for x, y in zip(texts, fetched, strict=True))
    index = torch.cat([own, wrong, of_image])
    return MatchingRows(more, index, rows, torch.arange(len(index), device=index.device) < len(own))


def _images_to_fetch(states: Tensor, numbers: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """States of the images that other ranks have, and where each image stands in this rank's and those."""
    counts = row_counts(len(states), states.device, group)
    first = first_row(counts, group)
    is_own = (numbers >= first) & (numbers < first + len(states))
    foreign, place = numbers[~is_own].unique(return_inverse=True)
    index = numbers - first
    index[~is_own] = len(states) + place
    return fetch_rows(states, foreign, group), index


def trimmed(tokens: Tensor, num_text: Tensor, group: Group = None) -> Tensor:
    """int64 `[m, T]`, of which the first `num_text` `[m]` of each row count, without what is padding in every row of
    every rank."""
    longest = num_text.max() if len(num_text) else num_text.new_zeros(())
    if world_size_of(group) > 1:
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    return tokens[:, : int(longest)]


def matching_loss(logits: Tensor, is_match: Tensor, group: Group = None) -> Tensor:
    """The cross-entropy of no and yes, `logits` `[R, 2]` and bool `[R]`, averaged over the pairs of all ranks."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, is_match.long(), reduction="sum")
    return global_ratio(total, torch.tensor(len(logits), device=logits.device), group)


def _similarities(tokens: Tensor, b: Tensor) -> Tensor:
    """`max_q <tokens_iq, b_j>`, float32 `[m, N]`."""
    rows = max(1, MAX_HELD // max(1, tokens.shape[1] * len(b)))
    parts = [(part.float() @ b.float().T).amax(1) for part in tokens.split(rows)]
    return torch.cat(parts) if parts else tokens.new_zeros(0, len(b), dtype=torch.float32)


def _drawn(similarities: Tensor, is_right: Tensor, generator: torch.Generator) -> Tensor:
    """One of each row that is not right, by the softmax's probabilities: the largest of logits with Gumbel noise."""
    uniform = torch.rand(similarities.shape, generator=generator, dtype=torch.float64).to(similarities.device)
    if not similarities.numel():
        return similarities.new_full((len(similarities),), -1, dtype=torch.int64)
    noisy = similarities.double() - (-uniform.log()).log()
    index = noisy.masked_fill(is_right, -torch.inf).argmax(1)
    return index.masked_fill(is_right.all(1), -1)
