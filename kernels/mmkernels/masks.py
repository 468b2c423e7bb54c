"""Which keys each query of `mmkernels.attention` sees, without a matrix: one or two intervals of keys a query.

Every constructor gives `Intervals`, O(L) memory, from which whole tiles are skipped; `dense` takes any matrix.
Shapes: B batch, Lq queries, Lk keys; a batch dimension of 1 serves every batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels._checks import require
from mmkernels._masks import Dense, Intervals, Mask

Device = torch.device | str | None


def intervals(num_keys: int, lo: Tensor, hi: Tensor, lo2: Tensor | None = None, hi2: Tensor | None = None) -> Intervals:
    """The keys from `lo` to `hi` - 1, and from `lo2` to `hi2` - 1, of each query.

    Args:
        num_keys: Lk.
        lo, hi: integers `[B or 1, Lq]`, 0 <= lo <= hi <= Lk; equal ends are an interval of nothing.
        lo2, hi2: those of a second interval, of the same shape, or None. Where the two overlap, a key counts
            once.

    Raises:
        ValueError: a wrong shape, dtype or device; ends out of range (looked at on a CPU alone: to read a
            GPU's would wait for it).
    """
    require("masks.intervals", (lo2 is None) == (hi2 is None), "lo2 and hi2 must come together, got {}", "one")
    ends = [x for x in (lo, hi, lo2, hi2) if x is not None]
    require("masks.intervals", lo.ndim == 2, "lo must be [B, Lq], got shape {}", list(lo.shape))
    for name, x in zip(("lo", "hi", "lo2", "hi2"), ends, strict=False):
        _check_integers("masks.intervals", name, x)
        require(
            "masks.intervals",
            x.shape == lo.shape and x.device == lo.device,
            "{} must be {} on {} like lo, got {} on {}",
            name,
            list(lo.shape),
            lo.device,
            list(x.shape),
            x.device,
        )
    for first, last in zip(ends[::2], ends[1::2], strict=True):
        _check_ends("masks.intervals", num_keys, first, last)
    return Intervals(num_keys, *(x.int() for x in ends))


def causal(num_queries: int, num_keys: int | None = None, *, device: Device = None) -> Intervals:
    """Query i sees the keys up to `i + Lk - Lq`: the last query sees all (bottom-right, as with cached keys).

    Args:
        num_queries: Lq.
        num_keys: Lk; None = Lq. With fewer keys than queries the first queries see nothing.
    """
    num_keys = num_queries if num_keys is None else num_keys
    last = torch.arange(num_queries, device=device, dtype=torch.int32)[None] + (num_keys - num_queries + 1)
    return Intervals(num_keys, torch.zeros_like(last), last.clamp(min=0), is_causal=True, is_ordered=True)


def key_padding(keys: Tensor, num_queries: int) -> Intervals:
    """Every query sees the keys that are no padding; joined by `&` with any other intervals, these do.

    Args:
        keys: bool `[B, Lk]`, True for a key to be seen, as a tokenizer's attention mask, wherever its padding lies.
        num_queries: Lq.
    """
    require("masks.key_padding", keys.ndim == 2, "keys must be [B, Lk], got shape {}", list(keys.shape))
    require("masks.key_padding", keys.dtype == torch.bool, "keys must be bool, got {}", keys.dtype)
    lo = torch.zeros(1, num_queries, device=keys.device, dtype=torch.int32)
    return Intervals(keys.shape[1], lo, torch.full_like(lo, keys.shape[1]), is_ordered=True).among(keys)


def lengths(num_seen: Tensor, num_queries: int, num_keys: int) -> Intervals:
    """Every query sees the first keys: padding on the right.

    Args:
        num_seen: integers `[B]`, from 0 to Lk.
    """
    hi = _lengths("masks.lengths", "num_seen", num_seen, num_keys)[:, None].expand(-1, num_queries)
    return Intervals(num_keys, torch.zeros_like(hi), hi, is_ordered=True)


def documents(ids: Tensor, *, causal: bool = True) -> Intervals:
    """Several samples packed into a row: each token sees its own.

    Args:
        ids: integers `[B, L]`, equal for the tokens of a sample, which lie side by side; below 0 for padding,
            which sees nothing and is not seen.
        causal: whether it sees those after itself too (False) or not.
    """
    op = "masks.documents"
    require(op, ids.ndim == 2, "ids must be [B, L], got shape {}", list(ids.shape))
    _check_integers(op, "ids", ids)
    num_tokens = ids.shape[1]
    place = torch.arange(num_tokens, device=ids.device, dtype=torch.int32).expand_as(ids)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    lo = torch.where(starts, place, 0).cummax(1).values.int()
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    hi = torch.where(ends, place + 1, num_tokens).flip(1).cummin(1).values.flip(1).int()
    hi = place + 1 if causal else hi
    return Intervals(num_tokens, lo, torch.where(ids < 0, lo, hi), is_ordered=True)


def prefix_causal(prefix: Tensor, num_queries: int, num_keys: int | None = None) -> Intervals:
    """Every query sees the prefix, and beyond it, causally (bottom-right), what came before itself.

    Args:
        prefix: integers `[B]`, the length of the prefix, from 0 to Lk.
        num_keys: Lk; None = Lq.
    """
    base = causal(num_queries, num_keys, device=prefix.device)
    hi = torch.maximum(base.hi, _lengths("masks.prefix_causal", "prefix", prefix, base.num_keys)[:, None])
    return Intervals(base.num_keys, torch.zeros_like(hi), hi, is_ordered=True)


def media(locations: Tensor, num_media: int, tokens_per_media: int, *, latest: bool = True) -> Intervals:
    """Text that sees the images before it, as Flamingo's gated cross-attention (arXiv:2204.14198).

    Args:
        locations: bool `[B, Lq]`, True at the token that stands for an image; that token sees its image.
        num_media: how many images a sample has, padding among them; keys are `[image, token]`.
        tokens_per_media: how many keys an image has.
        latest: the last image alone, as published; False for all images so far.

    Text before the first image sees nothing.
    """
    op = "masks.media"
    require(op, locations.ndim == 2, "locations must be [B, Lq], got shape {}", list(locations.shape))
    require(op, locations.dtype == torch.bool, "locations must be bool, got {}", locations.dtype)
    time = locations.cumsum(1)
    if time.is_cpu and not is_compiling() and time.numel():
        most = int(time.max())
        require(op, most <= num_media, "num_media must be at least the {} of locations, got {}", most, num_media)
    hi = time.int() * tokens_per_media
    lo = (hi - tokens_per_media).clamp(min=0) if latest else torch.zeros_like(hi)
    return Intervals(num_media * tokens_per_media, lo, hi, is_ordered=True)


def tiles(seen: Tensor, tokens_per_tile: int) -> Mask:
    """Text that sees some groups of keys: Llama-3.2-Vision's `[image, tile]`, IDEFICS's `[image]`.

    Args:
        seen: bool or 0 and 1, `[B, Lq, ...]`, whether a query sees a group; all dimensions after the second
            number the groups, in the order of the keys.
        tokens_per_tile: how many keys a group has.

    Up to two runs of groups a query are `Intervals`, more are `Dense`; counting them waits for a GPU.
    """
    require("masks.tiles", seen.ndim >= 3, "seen must be [B, Lq, ...], got shape {}", list(seen.shape))
    groups = seen.flatten(2).bool()
    found = from_dense(groups[:, None])
    if isinstance(found, Dense):
        return Dense(groups.repeat_interleave(tokens_per_tile, 2)[:, None])
    ends = (x * tokens_per_tile for pair in found.pairs for x in pair)
    return Intervals(found.num_keys * tokens_per_tile, *ends)


def qformer_itc(num_queries: int, num_text: Tensor, max_text: int) -> Intervals:
    """The Q-Former's contrastive mask over `[queries; text]`: neither sees the other (arXiv:2301.12597).

    Args:
        num_queries: the learned queries, which come first.
        num_text: integers `[B]`, how many of the text tokens are no padding.
        max_text: how many text tokens there are; Lq = Lk = num_queries + max_text.
    """
    is_text, seen = _qformer("masks.qformer_itc", num_queries, num_text, max_text)
    lo = torch.where(is_text, num_queries, 0).int().expand_as(seen)
    return Intervals(num_queries + max_text, lo, torch.where(is_text, seen, num_queries).int(), is_ordered=True)


def qformer_itm(num_queries: int, num_text: Tensor, max_text: int) -> Intervals:
    """The Q-Former's matching mask: queries and text see each other; see `qformer_itc`."""
    _, seen = _qformer("masks.qformer_itm", num_queries, num_text, max_text)
    return Intervals(num_queries + max_text, torch.zeros_like(seen), seen, is_ordered=True)


def qformer_itg(num_queries: int, num_text: Tensor, max_text: int) -> Intervals:
    """The Q-Former's generation mask: queries see queries, text sees them and, causally, text; see
    `qformer_itc`."""
    is_text, seen = _qformer("masks.qformer_itg", num_queries, num_text, max_text)
    place = torch.arange(num_queries + max_text, device=seen.device, dtype=torch.int32)
    hi = torch.where(is_text, torch.minimum(seen, place + 1), num_queries).int()
    return Intervals(num_queries + max_text, torch.zeros_like(hi), hi, is_ordered=True)


def qformer_pairs(num_queries: int, num_text: Tensor, max_text: int) -> Intervals:
    """Contrastive and generation mask at once, over `[queries; text; text to generate]`: the queries see themselves,
    the text itself, the other text the queries and, causally, itself; see `qformer_itc`."""
    op, length = "masks.qformer_pairs", num_queries + 2 * max_text
    seen = _lengths(op, "num_text", num_text, max_text)[:, None]
    place = torch.arange(length, device=num_text.device, dtype=torch.int32)
    second = num_queries + max_text
    is_query, is_second = place < num_queries, place >= second
    lo = torch.where(is_query | is_second, 0, num_queries).int().expand(len(seen), -1)
    hi = torch.where(is_query | is_second, num_queries, num_queries + seen).int()
    hi2 = torch.where(is_second, torch.minimum(second + seen, place + 1), second).int()
    return Intervals(length, lo, hi, torch.full_like(hi2, second), hi2)


def dense(values: Tensor) -> Dense:
    """Any mask: bool, True where a query sees a key, or floating point, added to the logits.

    Args:
        values: `[Lq, Lk]`, `[B, Lq, Lk]` or `[B, H, Lq, Lk]`; each of B, H and Lq may be 1 for all.
    """
    op = "masks.dense"
    require(op, 2 <= values.ndim <= 4, "values must be [B, H, Lq, Lk], got shape {}", list(values.shape))
    known = values.dtype == torch.bool or values.is_floating_point()
    require(op, known, "values must be bool or floating point, got {}", values.dtype)
    if values.ndim == 2:
        return Dense(values[None, None])
    return Dense(values[:, None] if values.ndim == 3 else values)


def from_dense(values: Tensor) -> Mask:
    """The intervals of a bool matrix, where no query sees more than two runs of keys; else `Dense`.

    Args:
        values: bool `[B or 1, H or 1, Lq or 1, Lk]`. Counting its runs waits for a GPU.
    """
    mask = dense(values)
    require("masks.from_dense", values.dtype == torch.bool, "values must be bool, got {}", values.dtype)
    if mask.values.shape[1] != 1:
        return mask
    seen = mask.values[:, 0].to(torch.int8)
    outside = seen.new_zeros(*seen.shape[:2], 1)
    steps = torch.diff(seen, dim=2, prepend=outside, append=outside)
    starts, ends = steps == 1, steps == -1
    num_runs = int(starts.sum(2).max()) if starts.numel() else 0
    if num_runs > 2:
        return mask
    pairs = []
    for run in range(1, max(num_runs, 1) + 1):
        pairs += [_place_of(run, edges) for edges in (starts, ends)]
    return Intervals(mask.num_keys, *pairs)


def _place_of(run: int, edges: Tensor) -> Tensor:
    """The index of the `run`-th True along the last dimension, int32; 0 where there is none."""
    is_it = edges & (edges.cumsum(-1) == run)
    return is_it.to(torch.int8).argmax(-1).int()


def _qformer(op: str, num_queries: int, num_text: Tensor, max_text: int) -> tuple[Tensor, Tensor]:
    """Whether a position is text `[L]`, and the end of what is no padding `[B, L]`."""
    seen = num_queries + _lengths(op, "num_text", num_text, max_text)
    place = torch.arange(num_queries + max_text, device=num_text.device)
    return place >= num_queries, seen[:, None].expand(-1, num_queries + max_text)


def _lengths(op: str, name: str, x: Tensor, most: int) -> Tensor:
    require(op, x.ndim == 1, "{} must be [B], got shape {}", name, list(x.shape))
    _check_integers(op, name, x)
    if x.is_cpu and not is_compiling() and x.numel():
        low, high = (int(end) for end in x.aminmax())
        require(op, low >= 0 and high <= most, "{} must be from 0 to {}, got {} to {}", name, most, low, high)
    return x.int()


def _check_integers(op: str, name: str, x: Tensor) -> None:
    known: Sequence[torch.dtype] = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    require(op, x.dtype in known, "{} must be of integers, got {}", name, x.dtype)


def _check_ends(op: str, num_keys: int, lo: Tensor, hi: Tensor) -> None:
    if not lo.is_cpu or is_compiling() or not lo.numel():
        return
    low, high = int(lo.min()), int(hi.max())
    require(op, low >= 0 and high <= num_keys, "ends must be from 0 to {}, got {} to {}", num_keys, low, high)
    wrong = (lo > hi).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        values = at, int(lo[at]), int(hi[at])
        require(op, False, "lo must be at most hi, got at {} {} and {}", *values)
