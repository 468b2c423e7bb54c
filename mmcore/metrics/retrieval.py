"""Image-text retrieval: R@k both ways, with several captions an image and equal captions shared by images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcore.ops import maxsim, require

RelevanceRows = Callable[[int, int], Tensor]


def check_features(caller: str, **features: Tensor) -> None:
    """ValueError unless each is [*, E] with one E, floating point, finite and not empty."""
    widths = {name: t.shape[-1] if t.ndim == 2 else None for name, t in features.items()}
    for name, t in features.items():
        fits = t.ndim == 2 and t.is_floating_point() and t.numel() > 0
        sentence = "{} must be floating point [N, E], not empty, got {} {}"
        require(caller, fits, sentence, name, t.dtype, list(t.shape))
        # a NaN is never above another score, so it would count as a hit
        strays = int((~t.isfinite()).sum())
        require(caller, strays == 0, "{} must be finite, got {} values that are not", name, strays)
    require(caller, len(set(widths.values())) <= 1, "features must share their last dimension, got {}", widths)


def check_ks(caller: str, ks: tuple[int, ...]) -> None:
    """ValueError unless `ks` holds at least one rank, all of them at least 1."""
    require(caller, len(ks) > 0 and min(ks) >= 1, "ks must be at least one rank, each at least 1, got {}", ks)


def counts_of(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """For each query, a row of `scores`, how many wrong candidates stand above its best right one, ties counting
    against it, and how many are right: int64.

    So a model that gives one embedding to everything scores 0, not 1.
    """
    right = right.to(scores.device)
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1), right.sum(dim=1)


def wrong_above_best(
    queries: Tensor, candidates: Tensor, relevant: RelevanceRows, *, chunk_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`counts_of` the inner products in float32 of queries [Q, E] and candidates [N, E], `chunk_size` queries at a
    time.

    `relevant` maps (start, stop) to a bool mask [stop - start, N] of right candidates, at least one a query.
    """
    candidates = candidates.float()
    for start in range(0, len(queries), chunk_size):
        stop = min(start + chunk_size, len(queries))
        yield counts_of(queries[start:stop].float() @ candidates.T, relevant(start, stop))


@dataclass(frozen=True)
class Relevance:
    """Which caption is right for which image: its own, and every one that has an equal caption."""

    image_index: Tensor  # [N] int64, the image of each caption
    group: Tensor  # [N] int64 in [0, number of distinct captions), one value for equal captions
    num_images: int  # each has at least one caption

    def texts_of_images(self, start: int, stop: int) -> Tensor:
        """Bool mask [stop - start, N] of the captions that are right for a range of images."""
        owned = (self.image_index >= start) & (self.image_index < stop)
        num_groups = int(self.group.max()) + 1
        has_group = torch.zeros(stop - start, num_groups, dtype=torch.bool)
        has_group[self.image_index[owned] - start, self.group[owned]] = True
        return has_group[:, self.group]

    def images_of_texts(self, start: int, stop: int) -> Tensor:
        """Bool mask [stop - start, num_images] of the images that are right for a range of captions."""
        groups, row = self.group[start:stop].unique(return_inverse=True)
        position = torch.full((int(self.group.max()) + 1,), -1)
        position[groups] = torch.arange(len(groups))
        here = position[self.group] >= 0
        images = torch.zeros(len(groups), self.num_images, dtype=torch.bool)
        images[position[self.group[here]], self.image_index[here]] = True
        return images[row]


def relevance_of(captions: Sequence[str], image_index: Sequence[int] | Tensor, *, num_images: int) -> Relevance:
    """Relevance from the text of N captions, equal but for case and white space being equal, and the image of each,
    [N], in [0, num_images); each image must have a caption."""
    index = torch.as_tensor(image_index, dtype=torch.int64).cpu()
    op, fits = "relevance_of", len(captions) > 0 and index.shape == (len(captions),)
    sentence = "image_index must hold one image for each caption, got {} for {} captions"
    require(op, fits, sentence, list(index.shape), len(captions))
    first, last = int(index.min()), int(index.max())
    require(op, first >= 0 and last < num_images, "image_index must be in [0, {}), got up to {}", num_images, last)
    bare = sorted(set(range(num_images)) - set(index.tolist()))
    require(op, not bare, "each image must have a caption, got none for image {}", *bare[:1])
    ids: dict[str, int] = {}
    group = [ids.setdefault(" ".join(caption.split()).lower(), len(ids)) for caption in captions]
    return Relevance(image_index=index, group=torch.tensor(group), num_images=num_images)


@torch.no_grad()
def retrieval_recall(
    image_features: Tensor,
    text_features: Tensor,
    relevance: Relevance,
    *,
    ks: tuple[int, ...] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Share of queries that find at least one right answer among the k nearest, and what chance would find.

    Ties count against the query. Chance is a random order of the same candidates with the same right answers:
    1 - C(N - r, k) / C(N, k), averaged over queries.

    Args:
        image_features: [I, E] floating point.
        text_features: [N, E].
        relevance: of I images and N captions.
        ks: ranks.
        chunk_size: queries scored at a time; memory is chunk_size x max(I, N).

    Returns:
        "image_to_text_R@k", "text_to_image_R@k" and the same with "_chance_R@k", each in [0, 1].
    """
    check_features("retrieval_recall", image_features=image_features, text_features=text_features)
    check_ks("retrieval_recall", ks)
    sizes, wanted = (len(image_features), len(text_features)), (relevance.num_images, len(relevance.group))
    sentence = "features must be of {} images and {} texts, got {} and {}"
    require("retrieval_recall", sizes == wanted, sentence, *wanted, *sizes)
    out: dict[str, float] = {}
    directions = (
        ("image_to_text", image_features, text_features, relevance.texts_of_images),
        ("text_to_image", text_features, image_features, relevance.images_of_texts),
    )
    for name, queries, candidates, rows in directions:
        above, num_right = zip(*wrong_above_best(queries, candidates, rows, chunk_size=chunk_size))
        out |= _recalls(f"{name}_", torch.cat(above), torch.cat(num_right), len(candidates), ks)
    return out


@torch.no_grad()
def recall_between(
    queries: Tensor, candidates: Tensor, right: RelevanceRows, *, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """`retrieval_recall` one way, of any two sets of rows, such as captions in two languages: floating point [Q, E] and
    [N, E], and the bool mask [stop - start, N] of the candidates that are right for a range of queries, at least one
    each. Returns "R@k" and "chance_R@k", each in [0, 1]."""
    check_features("recall_between", queries=queries, candidates=candidates)
    check_ks("recall_between", ks)
    above, num_right = zip(*wrong_above_best(queries, candidates, right, chunk_size=1024))
    return _recalls("", torch.cat(above), torch.cat(num_right), len(candidates), ks)


def recall_of_scores(
    image_to_text: Tensor, text_to_image: Tensor, relevance: Relevance, *, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """`retrieval_recall` of scores that no inner product gives, such as re-ranked ones: floating point [I, N] and [N,
    I] of I images and N captions, as `relevance` is, without NaN."""
    op, sizes = "recall_of_scores", (relevance.num_images, len(relevance.group))
    check_ks(op, ks)
    out: dict[str, float] = {}
    directions = (
        ("image_to_text", image_to_text, sizes, relevance.texts_of_images),
        ("text_to_image", text_to_image, sizes[::-1], relevance.images_of_texts),
    )
    for name, scores, shape, rows in directions:
        fits = scores.shape == shape and not scores.isnan().any()
        require(op, fits, "{} must be {} without NaN, got {}", name, list(shape), list(scores.shape))
        out |= _recalls(f"{name}_", *counts_of(scores, rows(0, len(scores))), shape[1], ks)
    return out


def late_scores(image: Tensor, text: Tensor, *, chunk_size: int = 256) -> tuple[Tensor, Tensor]:
    """Late interaction (arXiv 2111.07783) of tokens [I, P, E] and [N, T, E], floating point, zeros where padded: each
    image's mean over its tokens of the nearest of the text's, [I, N], and the same of each text, [N, I]."""
    op, masks = "late_scores", [x.ne(0).any(2) for x in (image, text)]
    fits = image.ndim == text.ndim == 3 and image.shape[2] == text.shape[2]
    require(op, fits, "text must be [N, T, E] beside {}, got {}", list(image.shape), list(text.shape))
    ways = ((image, masks[0], text, masks[1]), (text, masks[1], image, masks[0]))
    found = []
    for query, of_query, other, of_other in ways:
        parts = [
            maxsim(q, other, q_mask=mask, d_mask=of_other) / mask.sum(1).clamp(min=1)[:, None]
            for q, mask in zip(query.split(chunk_size), of_query.split(chunk_size), strict=True)
        ]
        found.append(torch.cat(parts))
    return found[0], found[1]


def _recalls(name: str, above: Tensor, num_right: Tensor, num_candidates: int, ks: tuple[int, ...]) -> dict[str, float]:
    """R@k and its chance, of queries with so many wrong candidates above the best right one."""
    out: dict[str, float] = {}
    wrong = (num_candidates - num_right.cpu().double())[:, None]  # [Q, 1]
    # 1 - C(N - r, k) / C(N, k), as a product of k ratios
    for k in ks:
        drawn = torch.arange(min(k, num_candidates), dtype=torch.float64)
        misses = ((wrong - drawn).clamp_min(0) / (num_candidates - drawn)).prod(dim=1)
        out[f"{name}R@{k}"] = (above < k).double().mean().item()
        out[f"{name}chance_R@{k}"] = (1 - misses).mean().item()
    return out


def recall_lines(recalls: Mapping[str, float], ks: tuple[int, ...] = (1, 5, 10)) -> list[str]:
    """`retrieval_recall`'s result to be printed, a line each way, in % with chance in brackets."""
    lines = []
    for direction in ("image_to_text", "text_to_image"):
        shares = [(k, recalls[f"{direction}_R@{k}"], recalls[f"{direction}_chance_R@{k}"]) for k in ks]
        cells = (f"R@{k} {100 * found:.1f} ({100 * chance:.1f})" for k, found, chance in shares)
        lines.append(f"  {direction.replace('_', ' ')}: {'  '.join(cells)}")
    return lines
