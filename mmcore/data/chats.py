"""`open_chats`: from a `ChatConfig` to conversations to train on, and those held out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmcore.data.config import DataConfig
from mmcore.data.sources.conversations import ConversationSet, open_conversations
from mmcore.data.sources.derived_chats import digit_conversations, stamp_conversations
from mmcore.data.sources.digits import open_digits
from mmcore.data.sources.split import split_linked
from mmcore.data.sources.stamps import Stamps, open_stamps
from mmcore.settings import free

_BUILT_IN = ("digits", "stamps")


@dataclass(frozen=True)
class ChatConfig:
    """Which conversations to train on."""

    data: str = "digits"
    """Conversations: LLaVA's JSON or JSONL, a mix of such files in YAML (datasets: json_path, sampling_strategy), or
    'digits' or 'stamps', about which conversations are derived from captions, classes and pixels."""
    val_data: str | None = None
    """Held-out conversations, of the same kinds; none: a share of --val-fraction is split off, by images."""
    val_fraction: float = 0.1
    """Share that is held out when --val-data is not given; 0 holds out nothing."""
    image_root: str | None = None
    """Folder of the images, or of tars with them; none: the folder of the JSON or YAML file."""
    language: Literal["en", "zh_CN"] = "en"
    """Language of 'stamps'."""
    workers: int | None = field(default=None, metadata=free)
    """Processes per rank that load data, 0 = the training process does; None = on a GPU one for each core that the
    rank can spare, at most 8, and else 0."""
    max_broken: float = 0.01
    """Share of broken records above which the run stops."""
    stamps_dir: Path | None = None
    """Folder of the unpacked stamps, filled if absent; none: a folder in the user's cache."""

    def __post_init__(self) -> None:
        for name in ("val_fraction", "max_broken"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "val_fraction" and value == 1):
                raise ValueError(f"--{name.replace('_', '-')} must be a share, got {value}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers must be at least 0, got {self.workers}")
        if self.image_root is not None and self.data in _BUILT_IN:
            raise ValueError(f"--image-root has no effect on {self.data!r}, got {self.image_root!r}")


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
    if config.data in _BUILT_IN:
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
    shared: Any = {"language": config.language, "max_broken": config.max_broken}
    stamps = open_stamps(DataConfig("stamps", val_fraction=fraction, stamps_dir=config.stamps_dir, **shared), seed)
    options |= shared
    assert isinstance(stamps.source, Stamps)
    train = stamp_conversations(stamps.source, stamps.questions, **options)
    if stamps.val is None:
        return train, None
    assert isinstance(stamps.val.source, Stamps)
    return train, stamp_conversations(stamps.val.source, stamps.val_questions, is_held_out=True, **options)
