"""Texts from any model of the next token: the likeliest token, tokens of the nucleus, or beam search."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mmcore.ops import accumulator, require

Step = Callable[[Tensor, Tensor | None], Tensor]
"""`(tokens int64 [R], rows int64 [R] or None)` to logits [R, V] of what comes next: `tokens[r]` is added to the text in
row `rows[r]` of the call before; None = to that in row r."""


def in_step(model: nn.Module) -> dict[str, bool]:
    """Options for `transformers`' `generate`: under ZeRO-3 ranks of which one is done run on until all are."""
    return {"synced_gpus": any(hasattr(p, "ds_tensor") for p in model.parameters())}


def check_decoding(
    op: str, *, num_beams: int, top_p: float | None, temperature: float, generator: torch.Generator | None
) -> None:
    """Raise a ValueError unless these go together: beams, or a nucleus with what belongs to it, or neither."""
    require(op, num_beams >= 1, "num_beams must be at least 1, got {}", num_beams)
    require(op, temperature > 0, "temperature must be above 0, got {}", temperature)
    if top_p is None:
        require(op, temperature == 1, "temperature must be 1 without top_p, got {}", temperature)
        require(op, generator is None, "generator must be None without top_p, got {}", "one")
    else:
        require(op, 0 < top_p <= 1, "top_p must be in (0, 1], got {}", top_p)
        require(op, num_beams == 1, "top_p must be None with num_beams {}, got {}", num_beams, top_p)


def generate(
    op: str,
    step: Step,
    start: Tensor,
    *,
    num_beams: int = 1,
    top_p: float | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    **ends: int,
) -> Tensor:
    """One text a row: of the likeliest token each time, by `beam_search`, or drawn from the `nucleus`; a ValueError,
    which begins with `op`, of options that do not go together. `ends` and the rest are as of `beam_search`."""
    check_decoding(op, num_beams=num_beams, top_p=top_p, temperature=temperature, generator=generator)
    if num_beams > 1:
        return beam_search(step, start, num_beams=num_beams, **ends)
    pick = partial(torch.argmax, dim=1)
    if top_p is not None:
        pick = partial(nucleus, top_p=top_p, temperature=temperature, generator=generator)
    return decode(step, start, pick, **ends)


def decode(
    step: Step,
    start: Tensor,
    pick: Callable[[Tensor], Tensor],
    *,
    max_length: int,
    eos_token_id: int,
    pad_token_id: int,
) -> Tensor:
    """One text a row, token by token, where `pick` takes the next tokens [B] from logits [B, V]; the rest is as of
    `beam_search`."""
    tokens, texts = start, []
    has_ended = torch.zeros_like(start, dtype=torch.bool)
    while len(texts) < max_length and not has_ended.all():
        tokens = pick(step(tokens, None)).masked_fill(has_ended, pad_token_id)
        texts.append(tokens)
        has_ended = has_ended | (tokens == eos_token_id)
    return torch.stack(texts, 1)


def nucleus(
    logits: Tensor,
    *,
    top_p: float,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Tokens, int64 [B], drawn by softmax(logits / temperature) of [B, V] from the fewest likely ones that reach
    `top_p` in (0, 1] (arXiv:1904.09751); the generator is on the device of the logits. `uniform` [B] in [0, 1) are the
    random numbers, one a row, in its place."""
    scaled = logits.to(accumulator(logits.dtype)) / temperature
    probabilities, tokens = scaled.softmax(1).sort(1, descending=True)
    before = probabilities.cumsum(1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0)
    if uniform is None:
        drawn = torch.multinomial(kept, 1, generator=generator)
    else:
        sums = kept.cumsum(1)
        drawn = torch.searchsorted(sums, uniform.to(sums)[:, None] * sums[:, -1:], right=True)
        drawn = drawn.minimum((kept > 0).sum(1, keepdim=True) - 1)
    return tokens.gather(1, drawn)[:, 0]


def beam_search(
    step: Step, start: Tensor, *, num_beams: int, max_length: int, eos_token_id: int, pad_token_id: int
) -> Tensor:
    """The text a row of the highest mean log-probability, its end token's included, among those that a beam meets.

    The beam holds the `num_beams` likeliest texts that go on; one ends where its end token is among the `num_beams`
    likeliest continuations, or at `max_length`. A row is done once no text that goes on can beat its best: sums of
    log-probabilities only fall, so none exceeds its sum so far over `max_length`. That is `transformers`' beam search
    with `early_stopping="never"`.

    Args:
        step: the model; its first call has a row for each beam.
        start: int64 [B], what the texts begin with; they are returned without it.

    Returns:
        int64 [B, T], T <= max_length, of the longest; padded after the end token.
    """
    batch, device = len(start), start.device
    first = torch.arange(batch, device=device)[:, None] * num_beams  # [B, 1] row of each beam's first text
    rows = torch.arange(batch, device=device).repeat_interleave(num_beams)
    tokens, texts = start[rows], start.new_empty(len(rows), 0)
    # one text to start with: its copies are not likely at all
    sums = torch.full((batch, num_beams), -torch.inf, device=device)
    sums[:, 0] = 0
    best, best_mean = start.new_full((batch, max_length), pad_token_id), sums.new_full((batch,), -torch.inf)
    best_length = torch.zeros_like(start)
    for length in range(1, max_length + 1):
        logits = step(tokens, rows)
        log_probs = logits.to(accumulator(logits.dtype)).log_softmax(1).unflatten(0, (batch, num_beams))
        # twice as many as go on: at most one of each text ends
        sums, chosen = (sums[:, :, None] + log_probs).flatten(1).topk(2 * num_beams)
        rows, tokens = first + chosen // logits.shape[1], chosen % logits.shape[1]
        texts = torch.cat([texts[rows], tokens[..., None]], 2)  # [B, 2K, length]
        is_end = tokens == eos_token_id
        is_done = is_end[:, :num_beams] | (length == max_length)
        mean, place = (sums[:, :num_beams] / length).masked_fill(~is_done, -torch.inf).max(1)
        is_better = mean > best_mean
        text = texts.take_along_dim(place[:, None, None], 1)[:, 0]
        best[:, :length] = torch.where(is_better[:, None], text, best[:, :length])
        best_length = torch.where(is_better, length, best_length)
        best_mean = torch.where(is_better, mean, best_mean)
        sums, place = sums.masked_fill(is_end, -torch.inf).topk(num_beams)
        if (sums[:, 0] / max_length <= best_mean).all():
            break
        rows, tokens = rows.gather(1, place).flatten(), tokens.gather(1, place).flatten()
        texts = texts.take_along_dim(place[..., None], 1).flatten(0, 1)
    return best[:, : best_length.max()]
