"""A model of transformers as it converses about images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.data.text.templates import AUTO
from mmcore.systems.vlm.model import ReadingModel
from mmcore.systems.vlm.reading import ReadChat, Reader, collate
from mmcore.systems.vlm.weights import load_body, load_processor
from mmcore.tasks.ranks import ALONE, Ranks
from mmcore.tasks.speaking import Answerer
from mmcore.tasks.talks import Reply, Sampling

BATCH_SIZE = 32


@dataclass(frozen=True)
class Talks:
    """A model that converses about images."""

    model: Any  # a `ReadingModel` in evaluation mode, bare or under an engine
    reader: Reader
    device: torch.device
    max_answer: int = 512  # tokens, unless a call says otherwise
    origin: str = ""  # what it was read from, for a person
    reads_questions = True

    def said(self, prompts: Sequence[ReadChat], **options: Any) -> list[list[int]]:
        """Tokens of an answer to each prompt; options of transformers' `generate`."""
        inputs = {
            n: x.to(self.device) for n, x in collate(prompts, self.reader.pad_token_id, to_left=True).inputs.items()
        }
        settings = {
            "do_sample": False,
            "max_new_tokens": self.max_answer,
            "eos_token_id": sorted(self.reader.stops),
            "pad_token_id": self.reader.pad_token_id,
            **options,
        }
        return self.model("generate", inputs, **settings).tolist()

    def dialogue(self, system: str | None = None, sampling: Sampling | None = None) -> "Dialogue":
        """To ask question after question."""
        return Dialogue(self, system, sampling or Sampling(max_new_tokens=self.max_answer))

    @torch.no_grad()
    def replies(
        self, chats: ConversationSet, *, most: int | None = None, ranks: Ranks = ALONE, **options: Any
    ) -> list[Reply]:
        """Every answer anew, after what was said before it, of `most` conversations evenly spread; on every rank of
        those that share the work. More broken conversations than their limit raise a ValueError."""
        num_read = len(chats) if most is None else min(most, len(chats))
        chosen = [number * len(chats) // num_read for number in range(num_read)]

        def answered(part: range) -> tuple[list[Reply], list[tuple[str, str]]]:
            asked: list[tuple[Reply, ReadChat]] = []
            broken = []
            for i in (chosen[n] for n in part):
                try:
                    asked += self._asked(chats.conversations[i], i, chats.raw_images(i))
                except BrokenRecord as error:
                    broken.append((chats.sample_id(i), error.reason))
            blank = Conversation("blank", ("",), (Turn("user", f"{IMAGE}\n?"), Turn("assistant", "?")))
            # the model runs on every rank
            read = asked or self._asked(blank, 0, [Image.new("RGB", (32, 32))])
            ids = self.said([prompt for _, prompt in read], **options)
            return [r._replace(said=self.reader.text(row)) for (r, _), row in zip(asked, ids)], broken

        found, tally = ranks.shared(len(chosen), BATCH_SIZE // 2, answered), chats.tally()
        tally.add(num_read, [pair for _, broken in found for pair in broken])
        tally.check(final=True)
        return [reply for replies, _ in found for reply in replies]

    def _asked(self, chat: Conversation, number: int, images: list[Image.Image]) -> list[tuple[Reply, ReadChat]]:
        found = []
        for n, turn in enumerate(chat.turns):
            if turn.role == "assistant":
                question = chat.turns[n - 1].text.replace(IMAGE, "").strip()
                found.append((Reply(number, question, "", turn.text), self.reader.prompt(chat.turns[:n], images)))
        return found

    def answerer(self, **options: Any) -> Answerer:
        """What it says about pictures, each asked in a conversation of its own; options of `generate`."""

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            asked = [[Turn("user", f"{IMAGE}\n{prompt}")] for prompt in prompts]
            read = [self.reader.prompt(turns, [image]) for turns, image in zip(asked, images, strict=True)]
            return [self.reader.text(row) for row in self.said(read, **options)]

        return say


class Dialogue:
    """Questions and answers about images, each read with all that was said and shown before."""

    def __init__(self, talks: Talks, system: str | None, sampling: Sampling) -> None:
        self.talks, self.system, self.sampling = talks, system, sampling
        self.reset()

    def reset(self) -> None:
        """Forgets what was said and shown."""
        self.images: list[Image.Image] = []
        self.turns: list[Turn] = [] if self.system is None else [Turn("system", self.system)]
        self.was_cut = False  # whether the last answer went on where it had to end

    def has_room(self, text: str, images: Sequence[Image.Image] = ()) -> bool:
        """Whether a question fits into as many tokens as the model was trained on, after all before it."""
        read = self.talks.reader.prompt(self._turns(text, images), [*self.images, *images])
        return len(read.labels) < self.talks.reader.max_length

    @torch.no_grad()
    def ask(self, text: str, images: Sequence[Image.Image] = ()) -> Iterator[str]:
        """The answer to the next question, whole, and then remembered; its RGB images come first. A ValueError of an
        empty one, and of one with marks of images or of the tokenizer."""
        if not text.strip() or IMAGE in text:
            raise ValueError(f"a question must be text, without {IMAGE}: images are given beside it, got {text!r}")
        turns, shown = self._turns(text, images), [*self.images, *images]
        read, drawn = self.talks.reader.prompt(turns, shown), self.sampling
        options: dict[str, Any] = {"max_new_tokens": drawn.max_new_tokens, "do_sample": drawn.temperature > 0}
        if drawn.temperature > 0:
            options |= {"temperature": drawn.temperature, "top_p": drawn.top_p, "top_k": 0}
        (ids,) = self.talks.said([read], **options)
        said = self.talks.reader.text(ids)
        self.was_cut = len(ids) == drawn.max_new_tokens and ids[-1] not in self.talks.reader.stops
        self.turns = [*turns, Turn("assistant", self.talks.reader.without_marks(said))]
        self.images = shown
        yield said

    def _turns(self, text: str, images: Sequence[Image.Image]) -> list[Turn]:
        return [*self.turns, Turn("user", f"{IMAGE}\n" * len(images) + text)]


def model_of_folder(folder: Path, template: str | None, device: torch.device) -> Talks:
    """A model in a folder of transformers with its processor; a ValueError of anything else, and of a template of
    another's."""
    if template not in (None, AUTO):
        raise ValueError(f"--template must be left out: {folder} has its processor's, got {template!r}")
    processor = load_processor(folder, None)
    body = load_body(folder, torch.bfloat16 if device.type == "cuda" else torch.float32)
    most = getattr(body.config.get_text_config(), "max_position_embeddings", None) or 1 << 15
    return Talks(ReadingModel(body).eval().to(device), Reader(processor, most), device, origin=str(folder))
