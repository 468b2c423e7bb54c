"""A tiny language model, trained in a minute on the texts of a data set: what stage 2 reads where none is at hand."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmcore.data import PairData
from mmcore.data.sources.shards import ShardSource
from mmcore.data.text.prompts import PromptTokens, prompt_texts
from mmcore.labels import IGNORED
from mmcore.parts.language import tiny_language_model, tiny_tokenizer

STEPS, BATCH_SIZE, LR, MAX_TEXT = 400, 64, 2e-3, 64
# of one picture, behind the words of another of its texts
TEXTS_A_ROW = 2

Said = tuple[str, str]
"""A prompt, "" allowed, and what follows it."""


def texts_by_picture(
    data: PairData, *, caption_prompt: str | None = None, question_prompt: str | None = None
) -> list[list[Said]]:
    """All that the training data says of each picture, in the words in which it will be asked; prompts as in
    `prompt_texts`."""
    found: dict[Any, list[Said]] = defaultdict(list)
    before = prompt_texts("caption", caption_prompt, [""])[0]
    if isinstance(data.source, ShardSource):  # which are one picture's is not known
        for i, caption in enumerate(data.source.captions()):
            found["caption", i].append((before, caption))
    elif data.source is not None:
        for i in range(len(data.source)):
            found[data.source.image_id(i)] += [(before, c) for c in data.source.all_captions(i)]
    asked = data.questions
    if asked is not None:
        for i in range(len(asked)):
            prompt = prompt_texts("vqa", question_prompt, [asked.question(i)])[0]
            found[asked.image_id(i)] += [(prompt, a) for a in asked.all_captions(i)]
    return list(found.values())


class Rows:
    """What the model learns: the words of an answer in any order, which are given, then texts of the same picture.

    So it takes up what stands before a text, wherever it stands: an image will be nothing else to it.
    """

    def __init__(self, said: Sequence[Sequence[Said]], seed: int) -> None:
        distinct = {text: i for i, text in enumerate(dict.fromkeys(t for texts in said for t in texts))}
        self.tokenizer = tiny_tokenizer([f"{p} {a}\n" if p else f"{a}\n" for p, a in distinct])
        read = PromptTokens(self.tokenizer, is_encoder_decoder=False, max_answer=MAX_TEXT)
        texts = read.pairs(*zip(*distinct, strict=True))
        bounds = zip(texts.tokens, texts.num_prompt.tolist(), texts.num_text.tolist(), strict=True)
        rows = [(row[:n], row[before : n - 1]) for row, before, n in bounds]
        self._texts, self._words = zip(*rows, strict=True)
        self._pictures = [[distinct[text] for text in of_one] for of_one in said]
        self._rng = np.random.default_rng(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and labels, int64 [B, T]."""
        ids, labels = [], []
        for picture in self._rng.integers(len(self._pictures), size=BATCH_SIZE).tolist():
            hint, *drawn = self._rng.choice(self._pictures[picture], size=1 + TEXTS_A_ROW)
            words = self._words[hint][self._rng.permutation(len(self._words[hint]))]
            texts = [self._texts[i] for i in drawn]
            ids.append(torch.cat([words, *texts]))
            labels.append(torch.cat([torch.full_like(words, IGNORED), *texts]))
        pad = self.tokenizer.pad_token_id
        return pad_sequence(ids, True, pad), pad_sequence(labels, True, IGNORED)


def train_tiny_lm(said: Sequence[Sequence[Said]], *, seed: int, steps: int) -> tuple[Any, Any, float]:
    """Trains a tokenizer and a causal model on what is said of each picture, in steps of `BATCH_SIZE` rows: the model,
    frozen, in evaluation mode; its tokenizer; the loss of the last tenth of the steps, in nats a token."""
    rows = Rows(said, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = tiny_language_model(rows.tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
        warmup = 0.2 if steps == 10 else 0.1  # torch divides by the steps of the warm-up less one
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=warmup)
        losses = []
        for _ in track(range(steps), "training a tiny language model", transient=True):
            ids, labels = rows.batch()
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return model.eval().requires_grad_(False), rows.tokenizer, sum(last) / len(last)
