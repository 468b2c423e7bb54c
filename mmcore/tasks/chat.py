"""What a LLaVA answers about held-out pictures: by exact match with what was said, beside the majority's answer."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from PIL import Image

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet
from mmcore.data.text.templates import ChatTokens
from mmcore.metrics.vqa import normalize_answer
from mmcore.systems.llava.inputs import Prompt, generate_inputs, prompt_of, see
from mmcore.systems.llava.model import LlavaConfig

BATCH_SIZE = 32


@dataclass(frozen=True)
class Reply:
    """An answer of the model's, and that of the conversation.

    Args:
        conversation: its number in the set.
        question: the user's last text, without the image's mark.
        said: by the model.
        wanted: by the conversation.
    """

    conversation: int
    question: str
    said: str
    wanted: str

    @property
    def is_right(self) -> bool:
        """Equal in VQA's normal form."""
        return normalize_answer(self.said) == normalize_answer(self.wanted)


@torch.no_grad()
def replies(
    forward: Callable[..., Any],
    tokens: ChatTokens,
    config: LlavaConfig,
    chats: ConversationSet,
    *,
    device: torch.device,
    most: int | None = None,
    **options: Any,
) -> list[Reply]:
    """Every answer anew, after what was said before it; under an engine, every rank alike.

    Args:
        forward: a `Llava`, bare or under an engine.
        tokens: of its language model.
        config: its own.
        chats: the conversations; those that could not be learned from are left out, within their limit.
        device: of the model.
        most: conversations, evenly spread; None = all.
        options: of `generate`.

    Raises:
        ValueError: too many broken conversations.
    """
    settings = {
        "do_sample": False,
        "max_new_tokens": 64,
        "eos_token_id": sorted(tokens.stops),
        "pad_token_id": tokens.pad_token_id,
        **options,
    }
    out: list[Reply] = []

    def answer(part: Sequence[_Asked]) -> None:
        inputs = generate_inputs([a.prompt for a in part], tokens.pad_token_id, config, device)
        ids = forward("generate", *inputs, **settings).cpu()
        out.extend(Reply(a.conversation, a.question, tokens.text(row), a.wanted) for a, row in zip(part, ids))

    asked, tally, count = [], chats.tally(), len(chats)
    num_read = count if most is None else min(most, count)
    for i in (number * count // num_read for number in range(num_read)):
        try:
            asked += _asked(tokens, config, chats.conversations[i], i, chats.raw_images(i))
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


def answers_recur(train: ConversationSet, val: ConversationSet) -> bool:
    """Whether some held-out answer is one that training has. Where none is, as among captions of pictures, no share of
    equal answers says how good they are."""
    known, wanted = (
        {normalize_answer(t.text) for c in chats.conversations for t in c.turns if t.role == "assistant"}
        for chats in (train, val)
    )
    return not known.isdisjoint(wanted)


def accuracy(found: Sequence[Reply]) -> float:
    """The share of right answers, in [0, 1]."""
    return sum(reply.is_right for reply in found) / len(found)


def majority_accuracy(train: ConversationSet, found: Sequence[Reply]) -> float:
    """The accuracy of the answer most frequent in training for the same question, or of all where it was not asked."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for conversation in train.conversations:
        turns = conversation.turns
        for before, turn in pairwise(turns):
            if turn.role == "assistant":
                counts[before.text.replace(IMAGE, "").strip()][turn.text] += 1
                overall[turn.text] += 1
    guesses = [(counts[r.question] or overall).most_common(1)[0][0] for r in found]
    right = [normalize_answer(guess) == normalize_answer(r.wanted) for guess, r in zip(guesses, found)]
    return sum(right) / len(right)
