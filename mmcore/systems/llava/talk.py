"""LLaVA as it converses: answers in conversations, answers about pictures, dialogues."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.data.text.templates import AUTO, ChatTokens
from mmcore.parts.language import load_language_tokenizer
from mmcore.systems.llava.dialogue import Dialogue, Sampling
from mmcore.systems.llava.inputs import Prompt, generate_inputs, prompt_of, see
from mmcore.systems.llava.model import LlavaConfig
from mmcore.systems.llava.weights import load_llava
from mmcore.tasks.replies import Reply
from mmcore.tasks.speaking import Answerer
from mmcore.tasks.talks import ASKED

BATCH_SIZE = 32


@dataclass(frozen=True)
class Talks:
    """A model that converses about images.

    Args:
        model: a `Llava` in evaluation mode, bare or under an engine.
        tokens: of its language model, with the template that it was trained with.
        config: its own.
        device: of the model.
        max_answer: tokens of an answer at most, unless a call says otherwise.
        origin: what it was read from, for a person.
    """

    model: Any
    tokens: ChatTokens
    config: LlavaConfig
    device: torch.device
    max_answer: int = 512
    origin: str = ""

    def named(self, origin: str) -> "Talks":
        """The same, with where it was read from."""
        return replace(self, origin=origin)

    @property
    def reads_questions(self) -> bool:
        """Whether it learned to answer, not to describe alone."""
        return self.tokens.template is None or not self.tokens.template.images_only

    def dialogue(self, system: str | None = None, sampling: Sampling | None = None) -> Dialogue:
        """To ask question after question; see `Dialogue`."""
        sampling = sampling or Sampling(max_new_tokens=self.max_answer)
        return Dialogue(self.model, self.tokens, system=system, sampling=sampling)

    @torch.no_grad()
    def replies(self, chats: ConversationSet, *, most: int | None = None, **options: Any) -> list[Reply]:
        """Every answer anew, after what was said before it; under an engine, every rank alike.

        Args:
            chats: the conversations; those that could not be learned from are left out, within their limit.
            most: conversations, evenly spread; None = all.
            options: of `generate`.

        Raises:
            ValueError: too many broken conversations.
        """
        settings = {
            "do_sample": False,
            "max_new_tokens": self.max_answer,
            "eos_token_id": sorted(self.tokens.stops),
            "pad_token_id": self.tokens.pad_token_id,
            **options,
        }
        out: list[Reply] = []

        def answer(part: Sequence[_Asked]) -> None:
            inputs = generate_inputs([a.prompt for a in part], self.tokens.pad_token_id, self.config, self.device)
            ids = self.model("generate", *inputs, **settings).cpu()
            said = [self.tokens.text(row) for row in ids]
            out.extend(Reply(a.conversation, a.question, text, a.wanted) for a, text in zip(part, said))

        asked, tally, count = [], chats.tally(), len(chats)
        num_read = count if most is None else min(most, count)
        for i in (number * count // num_read for number in range(num_read)):
            try:
                asked += _asked(self.tokens, self.config, chats.conversations[i], i, chats.raw_images(i))
            except BrokenRecord as error:
                tally.add(1, [(chats.sample_id(i), error.reason)])
                continue
            tally.add(1)
            while len(asked) >= BATCH_SIZE:
                answer(asked[:BATCH_SIZE])
                del asked[:BATCH_SIZE]
        tally.check(final=True)
        if asked:
            answer(asked)
        return out

    def answerer(self, **options: Any) -> Answerer:
        """What it says about pictures, each asked in a conversation of its own; options of `generate`."""

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            names = [str(i) for i in range(len(images))]
            asked = [
                Conversation(name, (name,), (Turn("user", f"{IMAGE}\n{prompt}"), Turn("assistant", "")))
                for name, prompt in zip(names, prompts, strict=True)
            ]
            given = _Given(dict(zip(names, images)))
            chats = ConversationSet("the held-out pictures", given, asked, False)
            return [reply.said for reply in self.replies(chats, **options)]

        return say


@dataclass(frozen=True)
class _Given:
    """Images at hand."""

    images: Mapping[str, Image.Image]

    def named_image(self, name: str, least: int | None = None) -> Image.Image:
        return self.images[name]


class _Asked(NamedTuple):
    conversation: int
    question: str
    wanted: str
    prompt: Prompt


def _asked(
    tokens: ChatTokens, config: LlavaConfig, chat: Conversation, number: int, images: list[Image.Image]
) -> list[_Asked]:
    """Each answer of a conversation, with what is read before it; raises BrokenRecord for one that cannot be learned
    from."""
    seen = [see(image, config) for image in images]
    tokens.sample(chat, [config.num_image_tokens(image.size) for image in seen])
    found = []
    for n, turn in enumerate(chat.turns):
        if turn.role == "assistant":
            question = chat.turns[n - 1].text.replace(IMAGE, "").strip()
            prompt = prompt_of(tokens, config, chat.turns[:n], seen)
            found.append(_Asked(number, question, turn.text, prompt))
    return found


def model_of_folder(folder: Path, template: str | None, device: torch.device) -> Talks:
    """What transformers or `save_llava` wrote, with its tokenizer.

    Args:
        folder: a LlavaForConditionalGeneration or LlavaNextForConditionalGeneration.
        template: that it was trained with, "auto" for the tokenizer's own; None = the latter, if there is one.
        device: to put it on.

    Raises:
        ValueError: no such folder, a model or tokenizer that ours is not, a template that it cannot have or that is
            not known.
    """
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
