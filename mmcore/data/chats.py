"""`open_chats`: from a `ChatConfig` to conversations to train on, and those held out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcore.data.config import BUILT_IN, DataConfig, EmojiStyle
from mmcore.data.sources.conversations import ConversationSet, open_conversations
from mmcore.data.sources.derived_chats import digit_conversations, emoji_conversations, stamp_conversations
from mmcore.data.sources.digits import open_digits
from mmcore.data.sources.emoji import open_emoji
from mmcore.data.sources.split import split_linked
from mmcore.data.sources.stamps import Stamps, open_stamps


@dataclass(frozen=True)
class ChatConfig:
    """Which conversations to train on."""

    data: str = "digits"
    """Conversations: LLaVA's JSON or JSONL, a mix of such files in YAML (datasets: json_path, sampling_strategy), or
    'digits', 'stamps' or 'emoji', about which conversations are derived from captions, classes and pixels."""
    val_data: str | None = None
    """Held-out conversations, of the same kinds; none: a share of --val-fraction is split off, by images."""
    val_fraction: float = 0.1
    """Share that is held out when --val-data is not given; 0 holds out nothing."""
    image_root: str | None = None
    """Folder of the images, or of tars with them; none: the folder of the JSON or YAML file."""
    language: str = "en"
    """Language of 'stamps', en or zh_CN, or of the names of 'emoji'."""
    style: EmojiStyle = "openmoji"
    """Which font draws 'emoji'."""
    workers: int = 0
    """Processes per rank that load data; 0 loads in the training process."""
    max_broken: float = 0.01
    """Share of broken records above which the run stops."""
    stamps_dir: Path | None = None
    """Folder of the unpacked stamps, filled if absent; none: a folder in the user's cache."""

    def __post_init__(self) -> None:
        for name in ("val_fraction", "max_broken"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "val_fraction" and value == 1):
                raise ValueError(f"--{name.replace('_', '-')} must be a share, got {value}")
        if self.workers < 0:
            raise ValueError(f"--workers must be at least 0, got {self.workers}")
        if self.image_root is not None and self.data in BUILT_IN:
            raise ValueError(f"--image-root has no effect on {self.data!r}, got {self.image_root!r}")
        if self.data == "emoji" and self.val_fraction != ChatConfig.val_fraction:
            raise ValueError(f"--val-fraction has no effect on 'emoji', got {self.val_fraction}")
        if self.data != "emoji" and self.style != ChatConfig.style:
            raise ValueError(f"--style has no effect on {self.data!r}, got {self.style}")

    def pairs(self) -> DataConfig:
        """The built-in pictures that derived conversations are about."""
        named: Any = {"language": self.language, "style": self.style, "stamps_dir": self.stamps_dir}
        pairs = DataConfig(self.data, max_broken=self.max_broken, **named)
        return pairs if self.data == "emoji" else replace(pairs, val_fraction=self.val_fraction)


@dataclass(frozen=True)
class ChatData:
    """Conversations to train on, and those held out, or None."""

    name: str
    train: ConversationSet
    val: ConversationSet | None

    @property
    def num_train(self) -> int:
        return len(self.train)


def open_chats(config: ChatConfig, *, seed: int, captions_only: bool = False) -> ChatData:
    """The conversations that `config` names, split by their images.

    Args:
        config: which.
        seed: of the split, of what a mix draws, and of what is asked in derived ones.
        captions_only: derived ones ask nothing but what is shown, as stage 1 has it.

    Raises:
        ValueError: one sentence for each thing that can be wrong with the input.
    """
    fraction = 0.0 if config.val_data is not None else config.val_fraction
    if config.data in BUILT_IN:
        train, val = _derived(config, fraction, seed, captions_only)
    else:
        train, val = _read(config, config.data, seed), None
        if fraction > 0:  # by images: conversations about one are on one side
            sides = split_linked([c.images for c in train.conversations], fraction, seed)
            train, val = (train.take(side) for side in sides)
    if config.val_data is not None:
        val = _read(config, config.val_data, seed)
    if len(train) < 2:
        raise ValueError(f"data: {config.data!r} must have at least 2 conversations, got {len(train)}")
    return ChatData(train.name, train, val)


def _read(config: ChatConfig, data: str, seed: int) -> ConversationSet:
    return open_conversations(data, image_root=config.image_root, max_broken=config.max_broken, seed=seed)


def _derived(
    config: ChatConfig, fraction: float, seed: int, captions_only: bool
) -> tuple[ConversationSet, ConversationSet | None]:
    options: Any = {"seed": seed, "captions_only": captions_only}
    if config.data == "digits":
        scans, held_out = open_digits(fraction, seed)
        val = None if held_out is None else digit_conversations(held_out, **options)
        return digit_conversations(scans, **options), val
    if config.data == "emoji":
        data = open_emoji(config.pairs())
        val = None if data.val is None else emoji_conversations(data.val.source, data.val_questions, **options)
        return emoji_conversations(data.source, data.questions, **options), val
    stamps = open_stamps(replace(config.pairs(), val_fraction=fraction), seed)
    options |= {"language": config.language, "max_broken": config.max_broken}
    assert isinstance(stamps.source, Stamps)
    train = stamp_conversations(stamps.source, stamps.questions, **options)
    if stamps.val is None:
        return train, None
    assert isinstance(stamps.val.source, Stamps)
    return train, stamp_conversations(stamps.val.source, stamps.val_questions, is_held_out=True, **options)
