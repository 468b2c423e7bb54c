"""LLaVA as it converses: answers in conversations, answers about pictures, dialogues."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.data.sources.questions import NO_IMAGE
from mmcore.data.text.templates import AUTO, ChatTokens
from mmcore.parts.language import load_language_tokenizer
from mmcore.systems.llava.dialogue import Dialogue, Sampling
from mmcore.systems.llava.inputs import SeenChat, generate_inputs, prompt_of, see
from mmcore.systems.llava.model import LlavaConfig
from mmcore.systems.llava.weights import load_llava
from mmcore.tasks.ranks import ALONE, Ranks
from mmcore.tasks.speaking import Answerer
from mmcore.tasks.talks import ASKED, Reply

BATCH_SIZE = 32


@dataclass(frozen=True)
class Talks:
    """A model that converses about images."""

    model: Any  # a `Llava` in evaluation mode, bare or under an engine
    tokens: ChatTokens  # with the template that it was trained with
    config: LlavaConfig
    device: torch.device
    max_answer: int = 512  # tokens, unless a call says otherwise
    origin: str = ""  # what it was read from, for a person

    @property
    def reads_questions(self) -> bool:
        """Whether it learned to answer, not to describe alone."""
        return self.tokens.template is None or not self.tokens.template.images_only

    def dialogue(self, system: str | None = None, sampling: Sampling | None = None) -> Dialogue:
        """To ask question after question; see `Dialogue`."""
        sampling = sampling or Sampling(max_new_tokens=self.max_answer)
        return Dialogue(self.model, self.tokens, system=system, sampling=sampling)

    @torch.no_grad()
    def replies(
        self, chats: ConversationSet, *, most: int | None = None, ranks: Ranks = ALONE, **options: Any
    ) -> list[Reply]:
        """Every answer anew, after what was said before it, of `most` conversations evenly spread; on every rank of
        those that share the work. Options are of `generate`; more broken conversations than their limit raise a
        ValueError."""
        settings = {
            "do_sample": False,
            "max_new_tokens": self.max_answer,
            "eos_token_id": sorted(self.tokens.stops),
            "pad_token_id": self.tokens.pad_token_id,
            **options,
        }
        num_read = len(chats) if most is None else min(most, len(chats))
        groups: list[list[int]] = []  # of conversations with about BATCH_SIZE answers
        room = 0
        for i in (number * len(chats) // num_read for number in range(num_read)):
            num_answers = sum(turn.role == "assistant" for turn in chats.conversations[i].turns)
            if num_answers > room or not groups:
                groups.append([])
                room = BATCH_SIZE
            groups[-1].append(i)
            room -= num_answers

        def answered(part: range) -> tuple[list[Reply], list[tuple[str, str]]]:
            asked, broken = [], []
            for i in groups[part[0]] if part else []:
                try:
                    asked += self._asked(chats.conversations[i], i, chats.raw_images(i))
                except BrokenRecord as error:
                    broken.append((chats.sample_id(i), error.reason))
            # the model runs on every rank
            read = asked or self._asked(_about("blank", "?", True), 0, [Image.new("RGB", (32, 32))])
            inputs = generate_inputs([p for _, p in read], self.tokens.pad_token_id, self.config, self.device)
            ids = self.model("generate", *inputs, **settings).cpu()
            return [r._replace(said=self.tokens.text(row)) for (r, _), row in zip(asked, ids)], broken

        found, tally = ranks.shared(len(groups), 1, answered), chats.tally()
        tally.add(num_read, [pair for _, broken in found for pair in broken])
        tally.check(final=True)
        return [reply for replies, _ in found for reply in replies]

    def _asked(self, chat: Conversation, number: int, images: list[Image.Image]) -> list[tuple[Reply, SeenChat]]:
        """Each answer of a conversation, still unsaid, with what is read before it; raises BrokenRecord for a
        conversation that cannot be learned from."""
        seen = [see(image, self.config) for image in images]
        self.tokens.sample(chat, [self.config.num_image_tokens(image.size) for image in seen])
        found = []
        for n, turn in enumerate(chat.turns):
            if turn.role == "assistant":
                question = chat.turns[n - 1].text.replace(IMAGE, "").strip()
                prompt = prompt_of(self.tokens, self.config, chat.turns[:n], seen)
                found.append((Reply(number, question, "", turn.text), prompt))
        return found

    def answerer(self, **options: Any) -> Answerer:
        """What it says about pictures, each asked in a conversation of its own; options of `generate`."""

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            names = [str(i) for i in range(len(images))]
            has_image = [image is not NO_IMAGE for image in images]
            asked = [_about(*x) for x in zip(names, prompts, has_image, strict=True)]
            chats = ConversationSet("the held-out pictures", _Given(zip(names, images)), asked, False)
            return [reply.said for reply in self.replies(chats, **options)]

        return say


def _about(name: str, prompt: str, has_image: bool) -> Conversation:
    """What is asked about an image, or without one, still without an answer."""
    asked = Turn("user", f"{IMAGE}\n{prompt}" if has_image else prompt)
    return Conversation(name, (name,) if has_image else (), (asked, Turn("assistant", "")))


class _Given(dict[str, Image.Image]):
    """Images at hand."""

    def named_image(self, name: str, least: int | None = None) -> Image.Image:
        return self[name]


def model_of_folder(folder: Path, template: str | None, device: torch.device) -> Talks:
    """What transformers or `save_llava` wrote, with its tokenizer, of which None and "auto" take the template; a
    ValueError of a folder with another model or tokenizer, and of a template that it cannot have."""
    choices = f"--template must say how {folder} was trained, by {AUTO}, {', '.join(ASKED)}"
    if template not in (None, AUTO, *ASKED):
        raise ValueError(f"{choices}, got {template!r}")
    tokenizer = load_language_tokenizer(folder)
    if template is None and not tokenizer.chat_template:
        raise ValueError(f"{choices}, since its tokenizer has no chat template, got nothing")
    try:
        # how long its conversations were is not known
        tokens = ChatTokens(tokenizer, template or AUTO, tokenizer.model_max_length)
    except ValueError as error:
        raise ValueError(f"{choices}, got {template or 'nothing'}: {error}") from None
    model = load_llava(folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return Talks(model.eval().to(device), tokens, model.config, device, origin=str(folder))
