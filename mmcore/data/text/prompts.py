"""Prompts and answers in a language model's tokens: what is read, what is learned, and what came out as text."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmcore.labels import IGNORED
from mmcore.ops import require

Task = Literal["caption", "vqa"]
PROMPTS: dict[Task, str] = {"caption": "", "vqa": "Question: {} Answer:"}
"""As published; {} is the question's place."""


def prompt_texts(task: Task, prompt: str | None, questions: Sequence[str]) -> list[str]:
    """What stands before each answer: `prompt`, None = `PROMPTS[task]`, with a question in its place, {}; raises
    ValueError where vqa's has no place, or caption's has one."""
    prompt = PROMPTS[task] if prompt is None else prompt
    if prompt.count("{}") != (task == "vqa"):
        want = "hold one {} for the question" if task == "vqa" else "hold no {}, there is no question"
        raise ValueError(f"--prompt must {want}, got {prompt!r}")
    return [prompt.replace("{}", question.strip()) for question in questions]


class Prompted(NamedTuple):
    """Prompts with their answers, padded on the right."""

    tokens: Tensor  # int64 [B, T], prompt and answer; for an encoder-decoder the prompt
    num_prompt: Tensor  # int64 [B], how many are the prompt's
    num_text: Tensor  # int64 [B], how many are no padding
    targets: Tensor | None  # int64 [B, T'], an encoder-decoder's answers, -100 behind them


class Prompts(NamedTuple):
    """Prompts to go on from."""

    tokens: Tensor  # int64 [B, T], padded on the left for a causal model
    num_text: Tensor  # int64 [B], how many are no padding


class PromptTokens:
    """A tokenizer of transformers as BLIP-2 uses it: an answer of a causal model ends with a new line.

    Args:
        tokenizer: with a padding token.
        is_encoder_decoder: prompts are what an encoder reads, answers are a decoder's, and end as the tokenizer says.
        max_answer: tokens of an answer, its end included; what is longer is cut.
    """

    def __init__(self, tokenizer: Any, *, is_encoder_decoder: bool, max_answer: int) -> None:
        require("PromptTokens", max_answer >= 2, "max_answer must be at least 2, got {}", max_answer)
        self.tokenizer, self.is_encoder_decoder, self.max_answer = tokenizer, is_encoder_decoder, max_answer
        new_line = tokenizer("\n", add_special_tokens=False).input_ids
        has_end = bool(is_encoder_decoder or new_line)
        require("PromptTokens", has_end, "tokenizer must have a token for a new line, got none")
        # SentencePiece may put a space before it
        self.end_token_id: int = tokenizer.eos_token_id if is_encoder_decoder else new_line[-1]
        # what a model says behind either is no answer
        self.stops = {self.end_token_id, tokenizer.eos_token_id}

    def pairs(self, prompts: Sequence[str], answers: Sequence[str]) -> Prompted:
        """What a model learns: answers [B] after prompts [B], "" allowed; raises ValueError for a prompt and its answer
        whose tokens do not begin with the prompt's, so that no tokens are the answer's own."""
        if self.is_encoder_decoder:
            tokens, num_text = self._padded([self.tokenizer(p).input_ids for p in prompts])
            ids = self.tokenizer(list(answers), max_length=self.max_answer, truncation=True).input_ids
            targets, num_answer = self._padded(ids)
            place = torch.arange(targets.shape[1])
            return Prompted(tokens, num_text, num_text, targets.masked_fill(place >= num_answer[:, None], IGNORED))
        rows, num_prompt = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            before, after = self._split(prompt, answer)
            rows.append(before + [*after, self.end_token_id][: self.max_answer])
            num_prompt.append(len(before))
        tokens, num_text = self._padded(rows)
        return Prompted(tokens, torch.tensor(num_prompt, dtype=torch.int64), num_text, None)

    def prompts(self, prompts: Sequence[str]) -> Prompts:
        """What a model goes on from; prompts may be ""."""
        ids = [self._prompt(p) for p in prompts]
        return Prompts(*self._padded(ids, is_left=not self.is_encoder_decoder))

    def text(self, ids: Tensor) -> list[str]:
        """The answers in what a model generated, int64 [B, T]: up to the end, trimmed."""
        answers = [list(takewhile(lambda token: token not in self.stops, row)) for row in ids.tolist()]
        return [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]

    def _prompt(self, prompt: str) -> list[int]:
        ids = self.tokenizer(prompt).input_ids
        is_ended = not self.is_encoder_decoder and ids and ids[-1] == self.tokenizer.eos_token_id
        # where it is the begin of text too, it stays
        return ids[:-1] if is_ended and len(ids) > 1 else ids

    def _split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        before = self._prompt(prompt)
        whole = self._prompt(f"{prompt} {answer.strip()}" if prompt else answer.strip())
        what = "the tokens of prompt and answer must begin with the prompt's, got others for {!r} and {!r}"
        require("PromptTokens", whole[: len(before)] == before, what, prompt, answer)
        return before, whole[len(before) :]

    def _padded(self, rows: list[list[int]], *, is_left: bool = False) -> tuple[Tensor, Tensor]:
        num_text = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        tokens = torch.full((len(rows), max(map(len, rows), default=0)), self.tokenizer.pad_token_id)
        for row, ids in enumerate(rows):
            place = slice(tokens.shape[1] - len(ids), None) if is_left else slice(len(ids))
            tokens[row, place] = torch.tensor(ids, dtype=torch.int64)
        return tokens, num_text
