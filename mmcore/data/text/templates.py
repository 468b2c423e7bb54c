"""How a conversation is written for a language model, and which of its tokens are learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import IMAGE, Conversation, Turn
from mmcore.labels import IGNORED, IMAGE_TOKEN
from mmcore.ops import require

EOS = "{eos}"
"""In a template, the tokenizer's end of text."""


@dataclass(frozen=True)
class Template:
    """What is written around the texts of a conversation."""

    system: str = ""  # text of the system where the conversation has none
    system_marks: tuple[str, str] = ("", "")  # written before and after the system's text; nothing where that is empty
    user_marks: tuple[str, str] = ("", "")  # written before and after the user's text
    answer_mark: str = ""  # the end of a prompt; what follows it is learned
    answer_space: str = ""  # between that and the answer
    answer_end: str = EOS  # ends an answer and is learned; `EOS` in it becomes the tokenizer's
    answer_gap: str = ""  # written after that, and not learned
    images_only: bool = False  # of the user's text only the images are written, and there is one answer, a caption


TEMPLATES: dict[str, Template] = {
    "plain": Template(answer_end="\n", images_only=True),
    "v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
        system_marks=("", " "),
        user_marks=("USER: ", " "),
        answer_mark="ASSISTANT:",
        answer_space=" ",
    ),
    "llama_3": Template(
        system="You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
        system_marks=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user_marks=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        answer_mark="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer_end="<|eot_id|>",
    ),
    "chatml": Template(
        system="You are a helpful assistant.",
        system_marks=("<|im_start|>system\n", "<|im_end|>\n"),
        user_marks=("<|im_start|>user\n", "<|im_end|>\n"),
        answer_mark="<|im_start|>assistant\n",
        answer_end="<|im_end|>",
        answer_gap="\n",
    ),
}
"""LLaVA's stage 1 (`plain`), LLaVA-1.5's Vicuna (`v1`), and LLaVA-NeXT's Llama 3 and Qwen. The last two learn there
the assistant's role marker too, which a prompt already holds; here an answer and its end are learned alone."""
AUTO = "auto"
"""The tokenizer's own chat template."""


class ChatSample(NamedTuple):
    """A conversation in tokens."""

    tokens: Tensor  # int64 [T], IMAGE_TOKEN for each image, or for each of its features once expanded
    labels: Tensor  # int64 [T], the token itself where it is learned, else -100

    @property
    def num_images(self) -> int:
        """Images of a sample that is not expanded; fewer than the conversation's where it was cut."""
        return int((self.tokens == IMAGE_TOKEN).sum())


def expand(sample: ChatSample, counts: Sequence[int]) -> ChatSample:
    """A sample that has `IMAGE_TOKEN` once for each image with it once for each feature of an image; raises ValueError
    unless `counts` has these of each image, at least 1."""
    fits = len(counts) == sample.num_images and all(count >= 1 for count in counts)
    what = "counts must be at least 1 for each of {} images, got {}"
    require("expand", fits, what, sample.num_images, list(counts))
    repeats = _widths(sample, counts)
    return ChatSample(sample.tokens.repeat_interleave(repeats), sample.labels.repeat_interleave(repeats))


def _widths(sample: ChatSample, counts: Sequence[int]) -> Tensor:
    """How many tokens each of a sample's will be: of an image its features."""
    widths = torch.ones_like(sample.tokens)
    widths[sample.tokens == IMAGE_TOKEN] = torch.tensor(list(counts), dtype=torch.int64)
    return widths


_require = partial(require, "ChatTokens")
# a conversation as text, and where in it is what is learned
_Written = tuple[str, list[tuple[int, int]]]


class ChatTokens:
    """A tokenizer of transformers with a template.

    Args:
        tokenizer: with an end of text, which also pads where there is no padding token.
        template: a name of `TEMPLATES` whose end of an answer is a token, or `AUTO`.
        max_length: tokens of a sample, features of images included; what is longer is cut.
    """

    def __init__(self, tokenizer: Any, template: str, max_length: int) -> None:
        names = [*TEMPLATES, AUTO]
        _require(max_length >= 2, "max_length must be at least 2, got {}", max_length)
        _require(template in names, "template must be one of {}, got {!r}", ", ".join(names), template)
        _require(tokenizer.eos_token_id is not None, "tokenizer must have an end of text, got none")
        can_auto = template != AUTO or bool(tokenizer.chat_template)
        _require(can_auto, "tokenizer must have a chat template for 'auto', got none")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = None if template == AUTO else TEMPLATES[template]
        self.pad_token_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        begin = tokenizer("").input_ids[:1]
        # A chat template writes the begin of a text itself.
        self._begin = begin if self.template is not None and begin == [tokenizer.bos_token_id] else []
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted((added | set(tokenizer.all_special_tokens)) - {IMAGE})
        if self.template is not None and not self.template.images_only:
            end = self.template.answer_end
            num_ids = len(self._ids(end.replace(EOS, tokenizer.eos_token)))
            _require(num_ids == 1, "template {!r} needs {!r} as one token, got {}", template, end, num_ids)
        probe = Conversation("probe", ("",), (Turn("user", f"{IMAGE}\na"), Turn("assistant", "a")))
        try:
            labels = self._sample(probe).labels
        except BrokenRecord as error:
            raise ValueError(f"ChatTokens: {error.reason}") from None
        self.stops: frozenset[int] = frozenset({tokenizer.eos_token_id, int(labels[labels != IGNORED][-1])})
        """Tokens that end an answer."""

    def sample(self, conversation: Conversation, counts: Sequence[int] | None = None) -> ChatSample:
        """What a model learns of a conversation: each answer and its end, after all that was written before it.

        Args:
            conversation: as read.
            counts: features of each image, at least 1; None = 1 each.

        Returns:
            Tokens with `IMAGE_TOKEN` once for each image. Where the sample would be longer than `max_length` once
            expanded, it is cut, before an image that does not fit as a whole.

        Raises:
            BrokenRecord: nothing to learn within `max_length`; a special token in a text; for `plain`, no image or
                several answers.
            ValueError: naming the conversation's id: its tokens do not begin with those of a prompt of it, so that
                no tokens are the answer's own; another number of counts than of images.
        """
        counts = [1] * len(conversation.images) if counts is None else counts
        sample = self._cut(self._sample(conversation), counts, conversation.id)
        is_learned = bool((sample.labels[1:] != IGNORED).any())
        BrokenRecord.unless(is_learned, f"no answer within {self.max_length} tokens")
        return sample

    def prompt(self, turns: Sequence[Turn]) -> Tensor:
        """Tokens to generate an answer from, int64 [T]: those that a sample with the answer begins with. Raises
        ValueError where the last turn is not the user's; for a special token in a text; for `plain`, without an image.
        """
        _require(bool(turns) and turns[-1].role == "user", "turns must end with the user's, got none such")
        try:
            text = self._prompt_text(self._cleaned(turns))
        except BrokenRecord as error:
            raise ValueError(f"ChatTokens: turns must be as those to learn from, got: {error.reason}") from None
        return torch.tensor(self._encode(text))

    def text(self, ids: Tensor) -> str:
        """The answer in what a model generated, int64 [T]: up to the end, trimmed."""
        said = takewhile(lambda token: token not in self.stops, ids.tolist())
        return self.tokenizer.decode(list(said), skip_special_tokens=True).strip()

    def without_marks(self, text: str) -> str:
        """A text without what would not be read as text: spelled special tokens, and `IMAGE`."""
        marks = [IMAGE, *self._special]
        while found := [mark for mark in marks if mark in text]:  # taking one out may make another
            for mark in found:
                text = text.replace(mark, "")
        return text

    def _sample(self, conversation: Conversation) -> ChatSample:
        text, learned = self._write(conversation)
        tokens = self._encode(text)
        labels = [IGNORED] * len(tokens)
        for begin, end in learned:
            first, last = (self._boundary(text, place, tokens, conversation.id) for place in (begin, end))
            labels[first:last] = tokens[first:last]
        return ChatSample(torch.tensor(tokens), torch.tensor(labels))

    def _boundary(self, text: str, place: int, tokens: list[int], name: str) -> int:
        """How many tokens stand before a place of the text."""
        before = self._encode(text[:place])
        what = "the tokens of conversation {!r} must begin with those of its begin, got others up to {!r}, which the "
        what += "tokenizer merges with {!r}"
        around = text[max(0, place - 20) : place], text[place : place + 20]
        _require(tokens[: len(before)] == before, what, name, *around)
        return len(before)

    def _cut(self, sample: ChatSample, counts: Sequence[int], name: str) -> ChatSample:
        what = "counts must be given for the {} images of conversation {!r}, got {}"
        _require(sample.num_images == len(counts), what, sample.num_images, name, len(counts))
        kept = int((_widths(sample, counts).cumsum(0) <= self.max_length).sum())
        return ChatSample(sample.tokens[:kept], sample.labels[:kept])

    def _cleaned(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns with trimmed texts; the only image of a turn goes first, as LLaVA has it."""
        cleaned = []
        for turn in turns:
            text = turn.text.strip()
            rest = text.replace(IMAGE, "")
            is_plain = not any(token in rest for token in self._special)
            BrokenRecord.unless(is_plain, "a special token of the tokenizer in a text")
            if text.count(IMAGE) == 1:
                text = f"{IMAGE}\n{rest.strip()}".strip()
            cleaned.append(Turn(turn.role, text))
        return cleaned

    def _write(self, conversation: Conversation) -> _Written:
        turns = self._cleaned(conversation.turns)
        if self.template is None:
            return self._write_auto(turns, conversation.id)
        is_one = not self.template.images_only or sum(turn.role == "assistant" for turn in turns) == 1
        BrokenRecord.unless(is_one, "several answers, where a caption is learned")
        text, learned = "", []
        for n, turn in enumerate(turns):
            if turn.role == "assistant":
                before = self._prompt_text(turns[:n])
                text = before + self._answer_text(turn.text)
                learned.append((len(before), len(text)))
                text += self.template.answer_gap
        return text, learned

    def _answer_text(self, text: str) -> str:
        assert self.template is not None
        end = self.template.answer_end.replace(EOS, self.tokenizer.eos_token)
        return f"{self.template.answer_space}{text}{end}"

    def _prompt_text(self, turns: Sequence[Turn]) -> str:
        """All that is written before the answer to the last turn."""
        template = self.template
        if template is None:
            return self._apply(turns, is_prompt=True)
        if template.images_only:
            images = sum(turn.text.count(IMAGE) for turn in turns)
            BrokenRecord.unless(images > 0, "no image, where a caption is learned")
            return IMAGE * images
        has_system = turns[0].role == "system"
        system = turns[0].text if has_system else template.system
        texts = [system.join(template.system_marks)] if system else []
        for turn in turns[has_system:]:
            if turn.role == "user":
                texts += [turn.text.join(template.user_marks), template.answer_mark]
            else:
                texts += [self._answer_text(turn.text), template.answer_gap]
        return "".join(texts)

    def _write_auto(self, turns: list[Turn], name: str) -> _Written:
        text = self._apply(turns, is_prompt=False)
        learned = []
        for n, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before, after = self._prompt_text(turns[:n]), self._apply(turns[: n + 1], is_prompt=False)
            what = "the tokenizer's chat template must write the begin of conversation {!r} as it writes it alone, got "
            what += "another text up to turn {}"
            _require(text.startswith(after) and after.startswith(before), what, name, n)
            learned.append((len(before), self._answer_end(after, turn.text, name)))
        return text, learned

    def _answer_end(self, written: str, answer: str, name: str) -> int:
        """Where the end of an answer is: white space after its marker is no part of it, unless it is the marker."""
        trimmed = written.rstrip()
        if not trimmed.endswith(answer):
            return len(trimmed)
        what = "the tokenizer's chat template must write an end of an answer, got none in conversation {!r}"
        _require(trimmed != written, what, name)
        return len(written)

    def _apply(self, turns: Sequence[Turn], *, is_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:  # what its expressions raise too
            reason = f"the tokenizer's chat template refuses a conversation: {' '.join(str(error).split())}"
            raise BrokenRecord(reason) from None
        num_images = sum(turn.text.count(IMAGE) for turn in turns)
        what = "the tokenizer's chat template must write {} {}, got {}"
        _require(text.count(IMAGE) == num_images, what, num_images, IMAGE, text.count(IMAGE))
        return text

    def _encode(self, text: str) -> list[int]:
        ids = list(self._begin)
        for n, chunk in enumerate(text.split(IMAGE)):
            ids += [IMAGE_TOKEN] * (n > 0) + self._ids(chunk)
        return ids

    def _ids(self, text: str) -> list[int]:
        # Some tokenizers begin even an empty text with a space.
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []
