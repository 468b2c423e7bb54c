"""Answers in conversations: by exact match with what was said, beside the majority's answer."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmcore.data.sources.conversations import IMAGE, ConversationSet
from mmcore.metrics.vqa import normalize_answer


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
