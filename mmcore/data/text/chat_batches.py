"""Batches of conversations: padded, packed, and grouped by length and modality."""

from collections.abc import Sequence
from heapq import heapreplace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcore.data.text.templates import ChatSample
from mmcore.labels import IGNORED
from mmcore.ops import require


class ChatBatch(NamedTuple):
    """Samples, padded on the right."""

    tokens: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T], -100 where nothing is learned
    num_text: Tensor  # int64 [B], how many are no padding


class PackedBatch(NamedTuple):
    """Several samples in a row, padded on the right."""

    tokens: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T], -100 where nothing is learned, and at the first token of each sample
    num_text: Tensor  # int64 [B], how many are no padding
    position_ids: Tensor  # int64 [B, T], from 0 in each sample; 0 on padding
    documents: Tensor  # int64 [B, T], which of the row's samples, -1 on padding, as `mmkernels.masks` reads it
    samples: list[list[int]]  # the samples of each row, in order: that of their images


def collate(samples: Sequence[ChatSample], pad_token_id: int) -> ChatBatch:
    """B samples, at least one, as a batch; `pad_token_id` is written behind the shorter ones, never learned."""
    require("collate", bool(samples), "samples must be at least one, got none")
    tokens = pad_sequence([s.tokens for s in samples], True, pad_token_id)
    labels = pad_sequence([s.labels for s in samples], True, IGNORED)
    return ChatBatch(tokens, labels, torch.tensor([len(s.tokens) for s in samples]))


def pack(samples: Sequence[ChatSample], max_length: int, pad_token_id: int) -> PackedBatch:
    """Samples in rows of about the same length, as many as leave least to pad.

    Args:
        samples: expanded, at least one; none is split.
        max_length: most tokens of a row.
        pad_token_id: written behind the shorter rows, never learned.
    """
    lengths = [len(sample.tokens) for sample in samples]
    wrong = [f"{length} of sample {i}" for i, length in enumerate(lengths) if not 0 < length <= max_length]
    got = [*wrong, "none"][0]
    require("pack", bool(samples and not wrong), "samples must have 1 to {} tokens each, got {}", max_length, got)
    rows = _rows(lengths, max_length)
    batch = collate([_joined([samples[i] for i in row]) for row in rows], pad_token_id)
    places = [torch.cat([torch.arange(lengths[i]) for i in row]) for row in rows]
    owners = [torch.arange(len(row)).repeat_interleave(torch.tensor([lengths[i] for i in row])) for row in rows]
    return PackedBatch(*batch, pad_sequence(places, True, 0), pad_sequence(owners, True, -1), rows)


def _rows(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Those that pad least of first-fit decreasing's and of those that each number of rows has where the longest sample
    comes first, each into the row that is shortest."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best = _first_fit(lengths, order, max_length)
    least = _padded(lengths, best)
    for num_rows in range(-(-sum(lengths) // max_length), len(lengths) + 1):
        if num_rows * lengths[order[0]] >= least:
            break
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        filled = [(0, row) for row in range(num_rows)]
        for i in order:
            length, row = filled[0]
            rows[row].append(i)
            heapreplace(filled, (length + lengths[i], row))
        if max(filled)[0] <= max_length and _padded(lengths, rows) < least:
            best, least = rows, _padded(lengths, rows)
    return best


def _first_fit(lengths: Sequence[int], order: Sequence[int], max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        row = next((r for r, free in enumerate(room) if lengths[i] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_length)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def _padded(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    """Tokens of the rows, padding included."""
    return len(rows) * max(sum(lengths[i] for i in row) for row in rows)


def _joined(samples: Sequence[ChatSample]) -> ChatSample:
    labels = torch.cat([sample.labels for sample in samples])
    # A sample's first token would be learned from the sample before it.
    starts = torch.tensor([0] + [len(sample.tokens) for sample in samples[:-1]]).cumsum(0)
    labels[starts] = IGNORED
    return ChatSample(torch.cat([sample.tokens for sample in samples]), labels)
