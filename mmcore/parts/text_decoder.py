"""Texts that a BERT reading an image, or a question, writes token by token; answers ranked by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from mmcore.labels import IGNORED
from mmcore.nn import KeyValueCache, KeyValues
from mmcore.ops import accumulator, masks, require
from mmcore.parts.bert import BertEncoder
from mmcore.parts.decoding import beam_search, check_decoding, decode, nucleus
from mmcore.parts.text_head import TextHead


@dataclass(frozen=True)
class TextDecoder:
    """A view of modules of a model: what writes, and what it reads.

    Args:
        bert: causal here, whatever it is elsewhere; by its second self-attention where it has one.
        head: states to words.
        read: keys and values in each of its layers, [B, P, H, K].
        num_read: integers [B], how many of the P count; None = all.
    """

    bert: BertEncoder
    head: TextHead
    read: Sequence[KeyValues]
    num_read: Tensor | None = None

    def _states(self, tokens: Tensor, mask: masks.Mask | None, **options: Any) -> Tensor:
        seen, length = self.read[0].k.shape[1], tokens.shape[1]
        image_mask = None if self.num_read is None else masks.lengths(self.num_read, length, seen)
        decodes = self.bert.config.has_decoder
        return self.bert(tokens, mask, self.read, image_mask=image_mask, decodes=decodes, **options)

    def states(self, tokens: Tensor, num_text: Tensor) -> Tensor:
        """[B, T, D] of texts int64 [B, T], padded on the right, each token of which sees itself and those before."""
        length = tokens.shape[1]
        mask = masks.causal(length, device=tokens.device) & masks.lengths(num_text, length, length)
        return self._states(tokens, mask)

    def losses(
        self, tokens: Tensor, num_text: Tensor, *, num_prompt: int = 1, label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropy of the tokens behind the first `num_prompt`, summed, and how many there are."""
        labels = self._labels(tokens, num_text, num_prompt)
        total = self.head(self.states(tokens, num_text)[:, :-1], labels, label_smoothing=label_smoothing)
        return total, (labels != IGNORED).sum()

    def _labels(self, tokens: Tensor, num_text: Tensor, num_prompt: int) -> Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        is_learned = (place >= num_prompt) & (place < num_text[:, None])
        return tokens.masked_fill(~is_learned, IGNORED)[:, 1:]

    def of_each(self, tokens: Tensor, num_text: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """The cross-entropy of each text behind its first token, summed over its tokens: [B]."""
        labels = self._labels(tokens, num_text, 1)
        states = self.states(tokens, num_text)[:, :-1]
        each = self.head(states, labels, label_smoothing=label_smoothing, reduction="none")
        return each.view(labels.shape).sum(1)

    def of_rows(self, rows: Tensor) -> "TextDecoder":
        """That reads what these rows, int64 [R], do."""
        read = [KeyValues(kv.k[rows], kv.v[rows]) for kv in self.read]
        return TextDecoder(self.bert, self.head, read, None if self.num_read is None else self.num_read[rows])

    def generate(
        self,
        start: Tensor,
        *,
        max_length: int,
        min_length: int = 0,
        num_beams: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
        eos_token_id: int,
    ) -> Tensor:
        """Texts: the likeliest token at each step, by beam search, or drawn from the nucleus; a ValueError of an option
        out of its range, or without effect beside the others.

        Args:
            start: int64 [B, P], what the texts begin with, such as [DEC] and a prompt.
            max_length: most tokens of a text, its start included.
            min_length: fewest of them, the end not counted.
            num_beams, top_p, temperature, generator: see `mmcore.parts.decoding`.
            uniform: [B, N] in [0, 1), what each text is drawn by from the nucleus, a column a token, whatever texts are
                beside it; in place of a generator.
            eos_token_id: what ends a text.

        Returns:
            int64 [B, T], without the start, padded after the end.
        """
        op, config, first = "generate", self.bert.config, start.shape[1]
        check_decoding(op, num_beams=num_beams, top_p=top_p, temperature=temperature, generator=generator)
        most = config.num_positions
        require(op, first < max_length <= most, "max_length must be in [{}, {}], got {}", first + 1, most, max_length)
        caches = [KeyValueCache() for _ in range(config.num_layers)]
        if first > 1:
            self._states(start[:, :-1], masks.causal(first - 1, device=start.device), caches=caches)
        beams = torch.arange(len(start), device=start.device).repeat_interleave(num_beams)
        wide, places = self if num_beams == 1 else self.of_rows(beams), count(first - 1)

        def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
            if rows is not None:
                for cache in caches:
                    cache.select(rows)
            place = next(places)
            logits = self.head(wide._states(tokens[:, None], None, caches=caches, first_place=place)[:, 0])
            if place + 1 < min_length:
                logits = logits.index_fill(1, torch.tensor([eos_token_id], device=logits.device), -torch.inf)
            return logits

        ends = {"max_length": max_length - first, "eos_token_id": eos_token_id, "pad_token_id": config.pad_token_id}
        if num_beams > 1:
            return beam_search(step, start[:, -1], num_beams=num_beams, **ends)
        pick = partial(torch.argmax, dim=1)
        if top_p is not None:
            pick = partial(nucleus, top_p=top_p, temperature=temperature, generator=generator)
        if uniform is not None:
            fits = top_p is not None and generator is None and uniform.shape[1] >= max_length - first
            what = "uniform must be [B, N] of {} tokens or more, with top_p and without a generator, got {}"
            require(op, fits, what, max_length - first, list(uniform.shape))
            drawn, columns = pick, iter(uniform.unbind(1))
            pick = lambda logits: drawn(logits, uniform=next(columns))  # noqa: E731
        return decode(step, start[:, -1], pick, **ends)

    def rank(self, answers: Tensor, num_text: Tensor, top_k: int) -> Tensor:
        """For each row that is read the likeliest of A answers, int64 [A, T] with their first token in common: of the
        `top_k` by their second token the one of the largest log-probability in all. int64 [B]."""
        require("rank", 1 <= top_k <= len(answers), "top_k must be in [1, {}], got {}", len(answers), top_k)
        batch = len(self.read[0].k)
        start = answers[:1, :1].expand(batch, 1)
        logits = self.head(self._states(start, None)[:, 0])
        near = logits.to(accumulator(logits.dtype))[:, answers[:, 1]].topk(top_k, dim=1).indices  # [B, k]
        rows = torch.arange(batch, device=answers.device).repeat_interleave(top_k)
        loss = self.of_rows(rows).of_each(answers[near.flatten()], num_text[near.flatten()]).view(batch, top_k)
        return near.gather(1, loss.argmin(1, keepdim=True))[:, 0]
