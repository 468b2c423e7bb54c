"""Conversations as image-caption pairs."""

from dataclasses import dataclass

from PIL import Image

from mmcore.data.sources.base import EvalSet, PairSource, by_image, stable_hash
from mmcore.data.sources.conversations import ConversationSet
from mmcore.ops import require


@dataclass(frozen=True, repr=False)
class Answers(PairSource):
    """Conversations about one image each: the first answer is the caption."""

    chats: ConversationSet

    @classmethod
    def of(cls, chats: ConversationSet) -> "Answers":
        """Of the conversations, those about one image; raises ValueError where there are none."""
        single = [i for i, conversation in enumerate(chats.conversations) if len(conversation.images) == 1]
        require("data", bool(single), "{!r} must hold conversations about one image each, got none", chats.name)
        return cls(chats.take(single))

    def __len__(self) -> int:
        return len(self.chats)

    def _image(self, i: int) -> str:
        return self.chats.conversations[i].images[0]

    def sample_id(self, i: int) -> str:
        return self.chats.sample_id(i)

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        return self.chats.pictures.named_image(self._image(i), least)

    def image_id(self, i: int) -> int:
        return stable_hash(self._image(i))

    def all_captions(self, i: int) -> list[str]:
        return [next(turn.text for turn in self.chats.conversations[i].turns if turn.role == "assistant")]

    def held_out(self, max_broken: float) -> EvalSet:
        """All of them to measure a model on, each image with all of its captions."""
        texts = [self.all_captions(i)[0] for i in range(len(self))]
        return by_image(self, [self._image(i) for i in range(len(self))], texts, max_broken)
