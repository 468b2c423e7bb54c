"""What a processor of transformers makes of a conversation with images, and which of its tokens are learned."""

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import IMAGE, Conversation, Turn
from mmcore.data.text.chat_batches import pack
from mmcore.data.text.own_template import OwnTemplate
from mmcore.data.text.templates import ChatSample, shortened
from mmcore.labels import IGNORED
from mmcore.ops import require

TOKENS = "input_ids"


class ProcessorTemplate(OwnTemplate):
    """A processor's chat template, whose messages are lists of texts and images."""

    def __init__(self, processor: Any, special: Sequence[str]) -> None:
        # what it writes where an image stands, and the processor replaces
        self.mark: str = getattr(processor, "boi_token", None) or processor.image_token
        template, tokens = processor.chat_template, processor.tokenizer.special_tokens_map
        super().__init__(SimpleNamespace(get_chat_template=lambda: template, special_tokens_map=tokens), special)

    def _reads_strings(self, turns: Sequence[Turn]) -> bool:
        return False

    def _apply(self, turns: Sequence[Turn], *, is_prompt: bool = False) -> str:
        text = self._render(turns, add_generation_prompt=is_prompt)[0][0]
        num_images = sum(turn.text.count(IMAGE) for turn in turns)
        what = "the processor's chat template must write {} {}, got {}"
        require("vlm", text.count(self.mark) == num_images, what, num_images, self.mark, text.count(self.mark))
        return text

    def _content(self, text: str) -> list[dict[str, str]]:
        parts = [part for part in re.split(f"({IMAGE})", text) if part.strip()]
        return [{"type": "image"} if part == IMAGE else {"type": "text", "text": part.strip("\n")} for part in parts]


class ReadChat(NamedTuple):
    """A conversation as a model takes it."""

    inputs: Mapping[str, Tensor]  # of a batch of one
    labels: Tensor  # int64 [T], -100 where nothing is learned

    @property
    def sample(self) -> ChatSample:
        return ChatSample(self.inputs[TOKENS][0], self.labels)


class ReadBatch(NamedTuple):
    """Conversations that are run at once."""

    inputs: dict[str, Tensor]
    labels: Tensor  # int64 [B, T], -100 where nothing is learned


class Reader:
    """A processor of transformers as this recipe uses it.

    Args:
        processor: with a chat template and a tokenizer that has an end of text.
        max_length: tokens of a conversation, those of images included; what is longer is cut.
    """

    def __init__(self, processor: Any, max_length: int) -> None:
        require("vlm", bool(getattr(processor, "chat_template", None)), "--from must have a chat template, got none")
        require("vlm", max_length >= 2, "--max-length must be at least 2, got {}", max_length)
        self.processor, self.max_length, self.tokenizer = processor, max_length, processor.tokenizer
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted(added | set(self.tokenizer.all_special_tokens))
        try:
            self.template = ProcessorTemplate(processor, self._special)
        except BrokenRecord as error:
            raise ValueError(f"vlm: {error.reason}") from None
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        require("vlm", end is not None, "--from must have a tokenizer with an end of text, got none")
        self.pad_token_id: int = end if pad is None else pad
        ends = {self._ids(text)[-1] for text in self.template.ends if text.strip() in self._special}
        self.stops = frozenset({end, *ends})
        """Tokens that end an answer."""

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def read(self, chat: Conversation, images: Sequence[Image.Image]) -> ReadChat:
        """What is learned of a conversation: each answer and its end, after all that was written before it.

        Raises:
            BrokenRecord: nothing to learn within `max_length`, an image that does not fit as a whole, a special token
                in a text, a conversation that the template refuses.
        """
        text, learned = self.template.write(self._cleaned(chat.turns), chat.id)
        inputs, spans, offsets = self._processed(text, images)
        length = len(inputs[TOKENS][0])
        labels = torch.full((length,), IGNORED)
        for begin, end in learned:
            first, last = (_moved(place, spans) for place in (begin, end))
            is_learned = (offsets[:, 0] >= first) & (offsets[:, 1] <= last) & (offsets[:, 1] > offsets[:, 0])
            labels[is_learned] = inputs[TOKENS][0][is_learned]
        if length > self.max_length:
            end_of_images = max((new_end for _, _, _, new_end in spans), default=0)
            fits = bool((offsets[self.max_length :, 0] >= end_of_images).all())
            BrokenRecord.unless(fits, f"an image that does not fit into {self.max_length} tokens")
            inputs = {n: x[:, : self.max_length] if _is_of_tokens(x, length) else x for n, x in inputs.items()}
            labels = labels[: self.max_length]
        is_any = bool((labels[1:] != IGNORED).any())
        BrokenRecord.unless(is_any, f"no answer within {self.max_length} tokens")
        return ReadChat(inputs, labels)

    def prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> ReadChat:
        """What is read before the answer to the last of the turns, the user's; a ValueError of turns that cannot be
        written."""
        try:
            text = self.template.prompt(self._cleaned(turns))
        except BrokenRecord as error:
            raise ValueError(f"vlm: turns must be as those to learn from, got: {error.reason}") from None
        inputs, _, _ = self._processed(text, images[: text.count(self.template.mark)])
        return ReadChat(inputs, torch.full_like(inputs[TOKENS][0], IGNORED))

    def text(self, ids: Sequence[int]) -> str:
        """The answer in what a model generated: up to its end, trimmed."""
        said = []
        for token in ids:
            if token in self.stops:
                break
            said.append(token)
        return self.tokenizer.decode(said, skip_special_tokens=True).strip()

    def without_marks(self, text: str) -> str:
        """A text without spelled special tokens and `IMAGE`."""
        for mark in (IMAGE, *self._special):
            text = text.replace(mark, "")
        return text

    def shown(self, chat: ReadChat) -> str:
        """For a person: all that is read, `{{` before what is learned and `}}` behind it."""
        tokens, learns, out, at = chat.sample.tokens, chat.labels != IGNORED, "", 0
        for end in [*((learns[1:] != learns[:-1]).nonzero()[:, 0] + 1).tolist(), len(tokens)]:
            part = shortened(self.tokenizer.decode(tokens[at:end]).replace("\n", "\\n"), 200)
            out += f"{{{{{part}}}}}" if learns[at] else part
            at = end
        return out

    def _cleaned(self, turns: Sequence[Turn]) -> list[Turn]:
        cleaned = []
        for turn in turns:
            rest = turn.text.replace(IMAGE, "")
            is_plain = not any(token in rest for token in self._special)
            BrokenRecord.unless(is_plain, "a special token of the tokenizer in a text")
            cleaned.append(Turn(turn.role, turn.text.strip()))
        return cleaned

    def _processed(
        self, text: str, images: Sequence[Image.Image]
    ) -> tuple[dict[str, Tensor], list[tuple[int, int, int, int]], Tensor]:
        """The inputs of a batch of one; where images stand in the text and in what became of it; characters [T, 2] of
        each token."""
        begin = self.tokenizer.bos_token
        options = {"return_offsets_mapping": True, "add_special_tokens": not (begin and text.startswith(begin))}
        found = self.processor(
            text=[text], images=[list(images)] if images else None, return_tensors="pt",
            return_text_replacement_offsets=True, text_kwargs=options,
        )  # fmt: skip
        moved = found.pop("text_replacement_offsets", [[]])
        spans = [(*x["span"], *x["new_span"]) for x in (moved[0] if moved else [])]
        offsets = torch.as_tensor(found.pop("offset_mapping"))[0]
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}, spans, offsets


def _moved(place: int, spans: Sequence[tuple[int, int, int, int]]) -> int:
    """Where a place of the text is once its images are written out."""
    shift = 0
    for _, end, _, new_end in spans:
        if end <= place:
            shift = new_end - end
    return place + shift


def _is_of_tokens(x: Tensor, length: int) -> bool:
    return x.ndim == 2 and x.shape == (1, length)


def collate(chats: Sequence[ReadChat], pad_token_id: int, *, to_left: bool = False) -> ReadBatch:
    """Conversations, each in a row of its own, padded on one side."""
    most = max(len(chat.labels) for chat in chats)

    def padded(x: Tensor, value: int) -> Tensor:
        count = most - x.shape[-1]
        return F.pad(x, (count, 0) if to_left else (0, count), value=value)

    inputs: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for chat in chats for name in chat.inputs):
        parts = [chat.inputs[name] for chat in chats if name in chat.inputs]
        of_tokens = all(_is_of_tokens(chat.inputs[name], len(chat.labels)) for chat in chats if name in chat.inputs)
        if of_tokens and len(parts) == len(chats):
            parts = [padded(x, pad_token_id if name == TOKENS else 0) for x in parts]
        inputs[name] = _joined(parts)
    inputs.setdefault("attention_mask", torch.ones_like(inputs[TOKENS]))
    return ReadBatch(inputs, torch.stack([padded(chat.labels, IGNORED) for chat in chats]))


def packed(chats: Sequence[ReadChat], pad_token_id: int, max_length: int) -> ReadBatch:
    """Several conversations in a row; positions begin anew in each."""
    batch = pack([chat.sample for chat in chats], max_length, pad_token_id)
    chats = [chats[i] for row in batch.samples for i in row]
    inputs = {TOKENS: batch.tokens, "position_ids": batch.position_ids}
    for name in dict.fromkeys(name for chat in chats for name in chat.inputs):
        if name not in (TOKENS, "attention_mask"):
            inputs[name] = _joined([chat.inputs[name] for chat in chats if name in chat.inputs])
    return ReadBatch(inputs, batch.labels)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Behind each other, their other axes padded with 0 to the largest."""
    most = [max(sizes) for sizes in zip(*(x.shape[1:] for x in parts), strict=True)]
    pads = [[y for have, want in zip(x.shape[:0:-1], most[::-1], strict=True) for y in (0, want - have)] for x in parts]
    return torch.cat([F.pad(x, pad) if any(pad) else x for x, pad in zip(parts, pads, strict=True)])
