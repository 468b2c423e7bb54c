"""Tux Paint's stamps: 785 pictures with captions in many languages (Debian: tuxpaint-stamps-default).

The stamps are under GPL-2, so they are fetched and read where the program runs, and are no part of it.
"""

import fcntl
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import DataConfig
from mmcore.data.pair_data import PairData
from mmcore.data.sources.base import EvalSet
from mmcore.data.sources.files import FilePairs
from mmcore.data.sources.questions import NUM_ANNOTATORS, Question, QuestionSet
from mmcore.data.sources.split import split_pairs
from mmcore.data.transforms.images import pad_to_square
from mmcore.errors import did_you_mean
from mmcore.ops import require

_LOG = logging.getLogger(__name__)

STAMPS_PACKAGE = "tuxpaint-stamps-default"
_INSIDE = Path("usr/share/tuxpaint/stamps")
_APT_TIMEOUT_S = 900
_ELSEWHERE = "unpack it elsewhere with dpkg-deb -x and give the folder as --stamps-dir"

_CLASS_NAMES = {
    "en": {"naturalforces": "forces of nature", "household": "household things", "symbols": "symbols and signs"},
    "zh_CN": {
        **{"animals": "动物", "clothes": "衣服", "food": "食物", "hobbies": "爱好", "household": "家居用品"},
        **{"medical": "医疗", "military": "军事", "naturalforces": "自然现象", "people": "人物", "plants": "植物"},
        **{"seasonal": "节日", "space": "太空", "sports": "运动", "symbols": "符号", "town": "城镇"},
        "vehicles": "交通工具",
    },
}
STAMP_TEMPLATES = {"en": ["a picture of {}", "{}", "a stamp about {}"], "zh_CN": ["{}的图片", "{}", "关于{}的图章"]}

_QUESTION = {"en": "which kind of thing is this?", "zh_CN": "这是哪一类东西？"}


@dataclass(frozen=True)
class Stamps(FilePairs):
    """Stamps with a caption each; `identities` are their paths under the folder of the stamps."""

    def sample_id(self, i: int) -> str:
        return self.identities[i]

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        """Stamp `i` on a white square, RGB, so that no crop cuts its ends off; raises BrokenRecord."""
        return pad_to_square(super().raw_image(i, least))


def open_stamps(config: DataConfig, seed: int) -> PairData:
    """The stamps that have a caption in `config.language`, split by caption with `seed`; fetched where they are absent.
    Raises ValueError for another language, no stamps and no way to fetch them, or too few with such a caption."""
    known, hint = " or ".join(STAMP_TEMPLATES), did_you_mean(config.language, STAMP_TEMPLATES)
    what = "language of 'stamps' must be {}, got {!r}{}"
    require("data", config.language in STAMP_TEMPLATES, what, known, config.language, hint)
    root = find_stamps(config.stamps_dir)
    tally = BrokenTally(config.max_broken, f"the stamps in {root}")
    names: list[str] = []
    texts: list[str] = []
    for png in sorted(root.rglob("*.png")):
        text_file = png.with_suffix(".txt")
        if not text_file.is_file():
            continue
        name = png.relative_to(root).as_posix()
        with tally.record(name):
            caption = parse_stamp_caption(text_file.read_bytes(), config.language)
            if caption is not None:
                names.append(name)
                texts.append(caption)
    tally.check(final=True)
    what = "the stamps in {} must have captions in language={!r}, got none"
    require("data", bool(names), what, root, config.language)
    stamps = Stamps([str(root / name) for name in names], names, texts)
    # Stamps that lie loose in the folder have no class.
    folders = sorted({name.split("/")[0] for name in names}) if all("/" in name for name in names) else []
    train, val = (stamps.take(side) for side in split_pairs(names, texts, config.val_fraction, seed))
    held_out = None
    if len(val):
        labels = [folders.index(name.split("/")[0]) for name in val.identities] if folders else None
        held_out = EvalSet(val, range(len(val)), [[text] for text in val.texts], labels, config.max_broken)
    data = PairData(config.data, len(train), train, held_out, config.max_broken)
    if not folders:
        return data
    questions, val_questions = (_stamp_questions(side, config) if len(side) else None for side in (train, val))
    names, templates = [_class_name(folder, config) for folder in folders], STAMP_TEMPLATES[config.language]
    return replace(data, class_names=names, templates=templates, questions=questions, val_questions=val_questions)


def _stamp_questions(stamps: Stamps, config: DataConfig) -> QuestionSet:
    """A question about each stamp, derived from its top folder: which kind of thing it is."""
    questions = [
        Question(name, _QUESTION[config.language], (_class_name(name, config),) * NUM_ANNOTATORS, "which", "other")
        for name in stamps.identities
    ]
    return QuestionSet("stamps (derived questions)", stamps, questions, True, config.max_broken)


def _class_name(name: str, config: DataConfig) -> str:
    """Name of the class of a stamp, or of a top folder."""
    folder = name.split("/")[0]
    return _CLASS_NAMES[config.language].get(folder, folder)


def parse_stamp_caption(data: bytes, language: str) -> str | None:
    """Caption in `language` from a stamp's text, or None where it has none: English on the first line, then lines
    'zh_CN.utf8=...'; raises BrokenRecord where it is not UTF-8."""
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BrokenRecord("caption is not UTF-8") from None
    if language == "en":
        return (lines[0].strip() or None) if lines else None
    prefix = f"{language}.utf8="
    found = next((line.removeprefix(prefix).strip() for line in lines if line.startswith(prefix)), None)
    return found or None


def find_stamps(stamps_dir: Path | None) -> Path:
    """Folder of the stamps: `stamps_dir` or the user's cache, filled from Debian's archive if absent; raises ValueError
    where it holds no stamps, or they cannot be fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmcore" / "tuxpaint-stamps"
    target = cache if stamps_dir is None else stamps_dir.expanduser()
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with (target.parent / ".mmcore-stamps.lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Another rank may have been here while this one waited.
                if not target.exists():
                    _fetch(target)
    except OSError as error:
        raise _fetch_error(str(error)) from None
    root = target / _INSIDE if (target / _INSIDE).is_dir() else target
    has_stamps = any(root.rglob("*.png"))
    require("data", has_stamps, "stamps_dir must hold stamps (PNG files with .txt captions), got {!r}", str(target))
    return root


def _fetch(target: Path) -> None:
    """Download and unpack the package without root, and move pictures and captions to `target` at once."""
    for tool in ("apt-get", "dpkg-deb"):
        what = "'stamps' needs {}, which is not installed, to fetch Debian's {}; {}"
        require("data", shutil.which(tool) is not None, what, tool, STAMPS_PACKAGE, _ELSEWHERE)
    _LOG.warning("fetching Debian's package %s (161 MB, once) into %s", STAMPS_PACKAGE, target)
    with tempfile.TemporaryDirectory(prefix=".stamps-", dir=target.parent) as temporary:
        work = Path(temporary)
        package = _download(work)
        _run(["dpkg-deb", "-x", str(package), str(work / "unpacked")], work)
        staging = work / "staging"
        source = work / "unpacked" / _INSIDE
        for file in (*source.rglob("*.png"), *source.rglob("*.txt")):
            copy = staging / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            file.rename(copy)
        if not staging.exists():
            raise _fetch_error(f"{package.name} has no {_INSIDE}")
        staging.rename(target)


def _download(work: Path) -> Path:
    """The package's file, by the machine's package lists or, where they lack it, by fresh ones."""
    for partial in ("state/lists/partial", "cache/archives/partial"):
        (work / partial).mkdir(parents=True)
    unsandboxed = ["-o", "APT::Sandbox::User="]
    own = [*unsandboxed, "-o", f"Dir::State={work / 'state'}", "-o", f"Dir::Cache={work / 'cache'}"]
    if not _run(["apt-get", *unsandboxed, "download", STAMPS_PACKAGE], work, may_fail=True):
        _run(["apt-get", *own, "update"], work)
        _run(["apt-get", *own, "download", STAMPS_PACKAGE], work)
    packages = list(work.glob("*.deb"))
    if len(packages) != 1:
        raise _fetch_error(f"apt-get left {len(packages)} packages")
    return packages[0]


def _run(command: list[str], folder: Path, *, may_fail: bool = False) -> bool:
    """Whether a command succeeded; an error where it did not, unless it may fail."""
    options: Any = {"capture_output": True, "text": True, "timeout": _APT_TIMEOUT_S}
    try:
        result = subprocess.run(command, cwd=folder, env={**os.environ, "LC_ALL": "C"}, **options)
    except subprocess.TimeoutExpired:
        raise _fetch_error(f"{command[0]} took longer than {_APT_TIMEOUT_S} s") from None
    if result.returncode and not may_fail:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise _fetch_error(lines[-1] if lines else f"{command[0]} ended with status {result.returncode}")
    return not result.returncode


def _fetch_error(cause: str) -> ValueError:
    return ValueError(f"data: Debian's package {STAMPS_PACKAGE} could not be fetched ({cause}); {_ELSEWHERE}")
