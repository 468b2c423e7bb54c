"""Sentences about two images each, true or false: NLVR2's (arXiv 1811.00491), and ones derived from scanned digits."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import DataConfig, LoaderSpec
from mmcore.data.sources.base import ImageSource
from mmcore.data.sources.digits import DIGIT_NAMES, Digits, open_digits
from mmcore.data.sources.files import FilePairs
from mmcore.data.sources.split import split_linked
from mmcore.errors import did_you_mean
from mmcore.ops import require

SIDES = ("left", "right")
PER_DIGIT = 4
"""Statements that are derived of each scan as the left one."""
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence, whether it is true, and the left and the right image it is about, as their source counts them."""

    identifier: str
    text: str
    is_true: bool
    images: tuple[int, int]


@dataclass(frozen=True)
class StatementRecord:
    """A statement to train on."""

    id: str
    text: str
    is_true: bool
    images: tuple[int, int]
    source: ImageSource

    def load(self, which: int, least: int | None = None) -> Image.Image:
        """Its left (0) or right (1) image, RGB; raises BrokenRecord. See `Pair.load`."""
        return self.source.raw_image(self.images[which], least)


@dataclass
class StatementSet:
    """Statements about pairs of images of one source, in random access.

    Args:
        name: the source, for prints.
        source: the images.
        statements: about them.
        max_broken: share of broken statements above which measuring raises.
        broken: broken records found on opening, by reason.
    """

    name: str
    source: ImageSource
    statements: list[Statement]
    max_broken: float = 0.0
    broken: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.statements)

    def record(self, i: int) -> StatementRecord:
        one = self.statements[i]
        return StatementRecord(one.identifier, one.text, one.is_true, one.images, self.source)

    def order(self, rng: np.random.Generator, spec: LoaderSpec) -> np.ndarray:
        return rng.permutation(len(self))

    def read(self, positions: Sequence[int]) -> tuple[list[list[Image.Image]], list[int], list[tuple[str, str]]]:
        """The left and the right images of statements that are good; their positions; the name and the reason of each
        other one."""
        pairs, good, broken = [], [], []
        for i in positions:
            record = self.record(i)
            try:
                pairs.append([record.load(which) for which in range(2)])
                good.append(i)
            except BrokenRecord as error:
                broken.append((record.id, error.reason))
        return [[pair[which] for pair in pairs] for which in range(2)], good, broken

    def check_broken(self, seen: int, broken: Sequence[tuple[str, str]]) -> None:
        """A ValueError where more than `max_broken` of the first `seen` are."""
        tally = BrokenTally(self.max_broken, f"the statements of {self.name}")
        tally.add(seen, broken)
        tally.check(final=seen == len(self))

    def take(self, indices: Sequence[int]) -> "StatementSet":
        return replace(self, statements=[self.statements[i] for i in indices])

    def with_other_images(self) -> "StatementSet":
        """The same sentences about the images of other statements: what a model knows without looking."""
        order = np.random.default_rng(0).permutation(len(self)).tolist()
        others = [self.statements[i].images for i in order]
        return replace(self, statements=[replace(x, images=y) for x, y in zip(self.statements, others, strict=True)])


@dataclass(frozen=True)
class StatementData:
    """Statements to train on, and those held out, or None."""

    name: str
    train: StatementSet
    val: StatementSet | None

    @property
    def num_train(self) -> int:
        return len(self.train)

    def with_other_images(self) -> "StatementData":
        """For a proof's control."""
        return replace(self, val=None if self.val is None else self.val.with_other_images())


def open_statements(config: DataConfig, *, seed: int) -> StatementData:
    """The statements that `config.data` names, some of them held out: a file of NLVR2 (a JSON object a line) or LAVIS's
    of it (a list), or 'digits', derived ones about two scans each. Statements that share an image are on one side. A
    ValueError of anything else."""
    name = config.data
    if name == "digits":
        config.check("digits")
        train, val = open_digits(config.val_fraction, seed)
        sets = [None if x is None else _of_digits(x, seed + i) for i, x in enumerate((train, val))]
        assert sets[0] is not None
        return StatementData(name, sets[0], sets[1])
    is_file = name.lower().endswith((".json", ".jsonl"))
    what = "data must be NLVR2's JSON, an object a line, LAVIS's list of them, or 'digits', got {!r}{}"
    require("data", is_file, what, name, did_you_mean(name, ("digits",)))
    config.check("json")
    for setting in ("annotations", "val_annotations"):
        value = getattr(config, setting)
        require("data", value is None, "{}={!r} has no effect on sentences about images, leave it out", setting, value)
    found, val = read_statements(name, config, "data"), None
    if config.val_data is not None:
        val = read_statements(config.val_data, config, "val_data")
        assert isinstance(found.source, FilePairs) and isinstance(val.source, FilePairs)
        shared = set(found.source.paths) & set(val.source.paths)
        what = "val_data must not share images with data, got {} in both, the first is {}"
        require("data", not shared, what, len(shared), min(shared, default=""))
    elif config.val_fraction > 0:
        sides = split_linked([x.images for x in found.statements], config.val_fraction, seed)
        found, val = (found.take(side) for side in sides)
    require("data", len(found) >= 2, "{!r} must have at least 2 training statements, got {}", name, len(found))
    return StatementData(name, found, val)


def open_held_out_statements(name: str, image_root: str | None) -> StatementData:
    """Those of a file, all of them held out; errors as of `open_statements`, and for 'digits', which a run splits
    itself."""
    require("data", name != "digits", "--data must be a file, of which all is held out, got {!r}", name)
    data = open_statements(DataConfig(name, image_root=image_root, val_fraction=0.0), seed=0)
    return replace(data, val=data.train)


def read_statements(path: str, config: DataConfig, argument: str) -> StatementSet:
    """The statements of a file and where their images are, looked for from `image_root`, or the file's folder, on: by
    the names that the file gives, in folders of splits and of NLVR2's directories too."""
    file = Path(path).expanduser()
    require("data", file.is_file(), "{} must be an existing file, got {!r}", argument, path)
    raw = _objects(file, argument)
    root = file.parent if config.image_root is None else Path(config.image_root).expanduser()
    require("data", root.is_dir(), "image_root must be an existing folder, got {!r}", str(root))
    place: dict[str, int] = {}
    statements, tally = [], BrokenTally(config.max_broken, f"{argument}={path!r}")
    found: dict[str, str] = {}
    for number, one in enumerate(raw, 1):
        with tally.record(f"{path}, statement {number}"):
            text, is_true, names, folders = _digested(one)
            for name in names:
                if name not in found:
                    found[name] = _found(root, name, folders)
                place.setdefault(found[name], len(place))
            pair = place[found[names[0]]], place[found[names[1]]]
            identifier = one.get("identifier")
            statements.append(Statement(str(identifier or f"{file.name}, {number}"), text, is_true, pair))
    tally.check(final=True)
    require("data", bool(statements), "{}={!r} must hold statements, got none", argument, path)
    files = FilePairs([*place], [*place], [""] * len(place))
    probed = files.paths[:: max(1, len(files.paths) // 100)]
    what = "image_root must be the folder of the images of {}={!r}, but none of {} tried exists, the first is {}"
    exists = any(Path(x).is_file() for x in probed)
    require("data", exists, what, argument, path, len(probed), probed[0])
    return StatementSet(path, files, statements, config.max_broken, tally.counts)


def _objects(file: Path, argument: str) -> list[Any]:
    """A JSON object a line, or a list of them."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        what = f"{argument}={str(file)!r} must hold a JSON object a line, as NLVR2, or a list, got: {error}"
        raise ValueError(f"data: {what}") from None


def _digested(one: Any) -> tuple[str, bool, list[str], list[str]]:
    """The sentence, whether it is true, the names of both images and folders they may be in; raises BrokenRecord."""
    BrokenRecord.unless(isinstance(one, dict), "no JSON object")
    text, label = one.get("sentence"), str(one.get("label")).lower()
    BrokenRecord.unless(isinstance(text, str) and bool(text.strip()), "no sentence")
    BrokenRecord.unless(label in _TRUTH, "label is neither True nor False")
    names, identifier = one.get("images"), one.get("identifier")
    if names is None:
        BrokenRecord.unless(isinstance(identifier, str) and identifier.count("-") >= 2, "no identifier of NLVR2")
        of_pair = str(identifier).rpartition("-")[0]  # the last number counts the sentences about one pair
        names = [f"{of_pair}-img{i}.png" for i in range(2)]
    are_two = isinstance(names, list) and len(names) == 2 and all(isinstance(x, str) and x for x in names)
    BrokenRecord.unless(are_two, "not two images")
    split, directory = str(identifier or "").partition("-")[0], one.get("directory")
    folders = [split, f"images/{split}"] if split else []
    if directory is not None:
        folders = [*(f"{x}/{directory}" for x in folders), str(directory), *folders]
    return str(text).strip(), _TRUTH[label], list(names), ["", *folders]


def _found(root: Path, name: str, folders: Sequence[str]) -> str:
    """The image's path; one that does not exist counts as a missing file where it is read."""
    places = [root / folder / name for folder in folders]
    return str(next((x for x in places if x.is_file()), places[0]))


def _of_digits(scans: Digits, seed: int) -> StatementSet:
    """Half of them true: what the left, the right or one of two digits is."""
    rng, statements = np.random.default_rng([seed, 0x57A7]), []
    for i in range(len(scans)):
        for k in range(PER_DIGIT):
            pair = i, int(rng.integers(len(scans)))
            digits, kind, is_true = [scans.classes[x] for x in pair], k % 3, bool(rng.integers(2))
            right = digits if kind == 2 else digits[kind : kind + 1]
            wrong = [x for x in range(10) if x not in right]
            beside = [x for x in digits if x in wrong]  # true of the other one
            if not is_true and beside and rng.random() < 0.5:
                digit = beside[0]
            else:
                digit = int(rng.choice(right if is_true else wrong))
            word = DIGIT_NAMES[digit]
            text = f"one of the digits is a {word}" if kind == 2 else f"the {SIDES[kind]} digit is a {word}"
            statements.append(Statement(f"digits-{scans.numbers[i]}-{k}", text, is_true, pair))
    return StatementSet("digits (derived statements)", scans, statements)
