"""Conversations about images in LLaVA's JSON: read, checked record by record, with their images found."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import LoaderSpec
from mmcore.data.grouping import group_by_modality_length
from mmcore.data.sources.files import read_image_file, some_of
from mmcore.data.sources.json_formats import is_unicode
from mmcore.data.sources.mixes import Sampling, read_mix
from mmcore.data.sources.tar import Place, index_images, read_range
from mmcore.data.transforms.images import decode_rgb
from mmcore.ops import require

Role = Literal["system", "user", "assistant"]
IMAGE = "<image>"
"""Where an image stands in a turn's text."""
MAX_SIDE = 20_000
"""Pixels; images with a longer side are refused."""

_ROLES: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}
_PLACE = r"s?(_?(path|file|name|url|list)s?)?"
_OTHER_MEDIA = re.compile(rf"(video|audio|sound|speech|frame){_PLACE}", re.IGNORECASE)
_OTHER_IMAGE = re.compile(rf"(image|img|picture|photo){_PLACE}", re.IGNORECASE)
_OTHER_MARK = re.compile(r"<\|?(video|audio|sound|speech)\w*\|?>|<\|image\w*\|>|<image_\w+>|<ImageHere>", re.IGNORECASE)
_SYSTEM = ("system", "system_prompt", "system_message")
_SAMPLING = 0x3117


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says; of the user, with an `IMAGE` where an image stands."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that ends with an answer of the assistant."""

    id: str  # as the source gives it; not unique
    images: tuple[str, ...]  # names, in the order of their `IMAGE` in the turns
    turns: tuple[Turn, ...]  # a system turn or none, then user and assistant in turns


class BrokenField(BrokenRecord):
    """A record that cannot be used for one of its fields: `field` with its value, `reason` a fixed phrase."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


class Pictures(Protocol):
    """Images by the names that conversations give them; picklable."""

    # RGB; raises BrokenRecord. Of a larger JPEG, `least` pixels of the shorter side are enough
    def named_image(self, name: str, least: int | None = None) -> Image.Image: ...


@dataclass(frozen=True, repr=False)
class NamedImages:
    """Image files of folder `root`, and `members`, the images in uncompressed tars that lie in it, by name."""

    root: Path
    members: dict[str, Place]

    def __contains__(self, name: str) -> bool:
        return str(PurePosixPath(name)) in self.members or (self.root / name).is_file()

    def named_image(self, name: str, least: int | None = None) -> Image.Image:
        where = self.members.get(str(PurePosixPath(name)))
        return decode_rgb(read_image_file(str(self.root / name)) if where is None else read_range(*where), least)


def open_images(root: Path) -> NamedImages:
    """The images in a folder; its tars are read by their headers once. Raises ValueError for no such folder, a damaged
    tar, or two tars with an image of the same name."""
    require("data", root.is_dir(), "image_root must be an existing folder, got {!r}", str(root))
    members: dict[str, Place] = {}
    for tar in map(str, sorted(root.glob("*.tar"))):
        for name, place in index_images(tar).items():
            first = members.setdefault(name, place)[0]
            what = "image_root must hold one image of each name, got {!r} in {} and {}"
            require("data", first == tar, what, name, first, tar)
    return NamedImages(root, members)


@dataclass(frozen=True)
class ChatRecord:
    """A conversation with its images, as a record."""

    source: "ConversationSet"
    index: int

    @property
    def conversation(self) -> Conversation:
        return self.source.conversations[self.index]

    @property
    def id(self) -> str:
        return self.conversation.id

    def images(self) -> list[Image.Image]:
        """RGB, in order; raises BrokenField."""
        return self.source.raw_images(self.index)


@dataclass(frozen=True, repr=False)
class ConversationSet:
    """Conversations with their images."""

    name: str  # the source, for prints; says so where the conversations are derived
    pictures: Pictures  # gives the images by name
    conversations: list[Conversation]
    derived: bool  # made by templates from captions or classes, not said by people or models
    max_broken: float = 0.0  # share of broken records above which a run stops
    broken: Counter[str] = field(default_factory=Counter)  # broken records found on opening, by reason

    def __len__(self) -> int:
        return len(self.conversations)

    def sample_id(self, i: int) -> str:
        return self.conversations[i].id

    def raw_images(self, i: int) -> list[Image.Image]:
        """RGB images of conversation `i`, in order; raises BrokenField where one is missing, unreadable, too small or
        too large."""
        return [check_sides(name, self._raw_image(name)) for name in self.conversations[i].images]

    def lengths(self) -> list[int]:
        """Words of each conversation, at least 1: the estimate of its length by which LLaVA groups."""
        return [max(1, sum(len(turn.text.split()) for turn in c.turns)) for c in self.conversations]

    def is_multimodal(self) -> list[bool]:
        """Which conversations have images."""
        return [bool(c.images) for c in self.conversations]

    def record(self, i: int) -> ChatRecord:
        return ChatRecord(self, i)

    def order(self, rng: np.random.Generator, spec: LoaderSpec) -> np.ndarray:
        """Runs of a global batch, each of one modality and of about the same length, as LLaVA orders them."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        sizes = spec.batch_size, spec.world_size
        return np.array(group_by_modality_length(self.lengths(), self.is_multimodal(), *sizes, generator))

    def take(self, indices: list[int]) -> "ConversationSet":
        return replace(self, conversations=[self.conversations[i] for i in indices])

    def tally(self) -> BrokenTally:
        """Counts broken records against the limit."""
        return BrokenTally(self.max_broken, repr(self.name), self.broken)

    def _raw_image(self, name: str) -> Image.Image:
        try:
            return self.pictures.named_image(name)
        except BrokenRecord as error:
            raise BrokenField(f"image {name!r}", error.reason) from None


def check_sides(name: str, image: Image.Image) -> Image.Image:
    """The image; raises BrokenField where it is a pixel wide or high, or has a side above `MAX_SIDE`."""
    size = f"image {name!r} of {image.width} x {image.height} pixels"
    BrokenField.unless(min(image.size) >= 2, size, "image of one pixel")
    BrokenField.unless(max(image.size) <= MAX_SIDE, size, f"image wider or higher than {MAX_SIDE:,} pixels")
    return image


def open_conversations(
    data: str, *, image_root: str | None = None, max_broken: float = 0.01, seed: int = 0
) -> ConversationSet:
    """Conversations of LLaVA's JSON or JSONL, or of a mix of such files.

    Args:
        data: .json, .jsonl, or a mix in .yaml, see `read_mix`.
        image_root: folder of the images or of tars with them; None = the folder of `data`.
        max_broken: share of broken records above which reading stops, of each file.
        seed: of what a mix draws.
    """
    is_mix = data.lower().endswith((".yaml", ".yml"))
    parts = read_mix(data) if is_mix else [(Path(data).expanduser(), Sampling("all"))]
    conversations: list[Conversation] = []
    broken: Counter[str] = Counter()
    for number, (path, sampling) in enumerate(parts):
        rng = np.random.default_rng([seed, _SAMPLING, number])
        tally = BrokenTally(max_broken, f"{str(path)!r}")
        conversations += _read(path, sampling, rng, tally)
        broken += tally.counts
    require("data", bool(conversations), "{!r} must hold at least one conversation, got none", data)
    pictures = open_images(Path(data).expanduser().parent if image_root is None else Path(image_root).expanduser())
    probed = some_of([name for conversation in conversations for name in conversation.images])
    if probed and not any(name in pictures for name in probed):
        what = f"image_root must be the folder of the images of {data!r} or of tars with them"
        first = pictures.root / probed[0]
        raise ValueError(f"data: {what}, but none of {len(probed)} tried exists, the first is {first}")
    return ConversationSet(data, pictures, conversations, False, max_broken, broken)


def _read(path: Path, sampling: Sampling, rng: np.random.Generator, tally: BrokenTally) -> Iterator[Conversation]:
    """The conversations to take of a file; the broken ones among them are counted."""
    entries, are_lines = _undigested(path)
    for number in sampling.indices(len(entries), rng):
        record = _parsed(entries[number]) if are_lines else entries[number]
        try:
            conversation = parse_conversation(number, record)
        except BrokenField as error:
            name = f"{path.name}, record {number} (id {_id(number, record)!r}), {error.field}"
            tally.add(1, [(name, error.reason)])
            continue
        tally.add(1)
        yield conversation
    tally.check(final=True)


def _undigested(path: Path) -> tuple[list[Any], bool]:
    """Records of a JSON file, or undigested lines of a JSONL file, and which of the two."""
    name, suffix = str(path), path.suffix.lower()
    is_known = suffix in (".json", ".jsonl")
    require("data", is_known, "conversations must be in a .json, .jsonl or .yaml file, got {!r}", name)
    require("data", path.is_file(), "data must be an existing file, got {!r}", name)
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file) if suffix == ".json" else [line for line in file if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {name!r} must be JSON in UTF-8, got: {error}") from None
    is_list = isinstance(content, list)
    require("data", is_list, "{!r} must hold a list of records, got {}", name, type(content).__name__)
    return content, suffix == ".jsonl"


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def parse_conversation(number: int, record: Any) -> Conversation:
    """A record of LLaVA's JSON: {"id", "image" or "images": str | [str] (optional), "system" (optional; or
    "system_prompt", "system_message"), "conversations": [{"from", "value"}]}; without an id, it has its number; raises
    BrokenField where it is none, or holds what a model of images and text does not read.
    """
    BrokenField.unless(isinstance(record, dict), "record", "not a JSON object")
    given = [name for name, value in record.items() if value and isinstance(value, str | list | dict)]
    for name in given:
        BrokenField.unless(not _OTHER_MEDIA.fullmatch(name), name, "neither text nor images: video or audio")
        is_aside = _OTHER_IMAGE.fullmatch(name) and not {"image", "images"} & {*given}
        BrokenField.unless(not is_aside, name, "image under another name than image")
    BrokenField.unless("tools" not in given, "tools", "tools are not put into the prompt")
    is_named_once = not (record.get("image") and record.get("images"))
    BrokenField.unless(is_named_once, "image and images", "images under two names")
    images = _images(record.get("image") or record.get("images"))
    turns = _turns(record.get("conversations"))
    for name in _SYSTEM:
        if record.get(name) is not None and str(record[name]).strip():
            BrokenField.unless(turns[0].role != "system", name, "two system turns")
            turns = (Turn("system", _text(record[name], "system", name)), *turns)
    marks = [mark[0] for turn in turns if turn.role == "user" and (mark := _OTHER_MARK.search(turn.text))]
    reason = f"neither text nor {IMAGE}: a mark of video, audio or other images"
    BrokenField.unless(not marks, "".join(marks[:1]), reason)
    num_marks = sum(turn.text.count(IMAGE) for turn in turns if turn.role == "user")
    where = f"conversations with {num_marks} {IMAGE} for {len(images)} images"
    BrokenField.unless(num_marks == len(images), where, f"number of {IMAGE} is not that of the images")
    return Conversation(_id(number, record), images, turns)


def _id(number: int, record: Any) -> str:
    value = record.get("id") if isinstance(record, dict) else None
    return str(value) if isinstance(value, (str, int)) and is_unicode(str(value)) else str(number)


def _images(value: Any) -> tuple[str, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    are_names = isinstance(names, list) and all(isinstance(n, str) and n and is_unicode(n) for n in names)
    BrokenField.unless(are_names, f"image={value!r:.60}", "neither a file's name nor a list of them")
    return tuple(names)


def _turns(value: Any) -> tuple[Turn, ...]:
    has_turns = isinstance(value, list) and bool(value)
    BrokenField.unless(has_turns, "conversations", "missing, empty or not a list")
    turns: list[Turn] = []
    for number, entry in enumerate(value):
        where = f"conversations[{number}]"
        BrokenField.unless(isinstance(entry, dict), where, "not a JSON object")
        is_learned = all(entry.get(name) in (None, True) for name in ("weight", "loss", "train"))
        BrokenField.unless(is_learned, where, "answers with a weight of their own")
        source, text = entry.get("from"), entry.get("value")
        role = _ROLES.get(source) if isinstance(source, str) else None
        if role is None:
            raise BrokenField(f"{where}.from={source!r:.40}", "role is not human, gpt or system")
        _check_order(turns[-1].role if turns else None, role, f"{where}.from={source!r}")
        turns.append(Turn(role, _text(text, role, f"{where}.value")))
    is_answered = turns[-1].role == "assistant"
    BrokenField.unless(is_answered, "conversations", "the last turn is not the assistant's answer")
    return tuple(turns)


def _check_order(last: Role | None, role: Role, where: str) -> None:
    """Raise a BrokenField where `role` cannot follow."""
    BrokenField.unless(role != last, where, "two turns of the same role in a row")
    BrokenField.unless(role != "system" or last is None, where, "system turn is not the first")
    begins = role != "assistant" or last == "user"
    BrokenField.unless(begins, where, "conversation does not begin with the human")


def _text(value: Any, role: Role, where: str) -> str:
    BrokenField.unless(isinstance(value, str) and is_unicode(value), where, "value is not text")
    BrokenField.unless(bool(value.strip()), where, "value is empty")
    BrokenField.unless(role == "user" or IMAGE not in value, where, f"{IMAGE} outside the human's turns")
    return value
