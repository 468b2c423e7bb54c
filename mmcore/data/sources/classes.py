"""Folders of classes, such as ImageNet's: a folder of images each, with names and templates of captions from files."""

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mmcore.data.config import DataConfig
from mmcore.data.pair_data import PairData
from mmcore.data.sources.base import EvalSet, stable_hash
from mmcore.data.sources.files import ImageFiles, check_disjoint, real_paths
from mmcore.data.sources.split import split_stratified
from mmcore.ops import require

OPENAI = "openai"
"""Of names and templates: those that CLIP was published with, in open_clip."""
TEMPLATE = "a photo of a {}."
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_NAMES = (
    "classnames.txt",
    "class_names.txt",
    "imagenet_class_index.json",
    "LOC_synset_mapping.txt",
    "synset_words.txt",
)
_TEMPLATES = ("templates.txt", "zeroshot_classification_templates.txt")
_SYNSET = re.compile(r"n\d{8}")
_NUM_IMAGENET = 1000


@dataclass(frozen=True, repr=False)
class ClassFolder(ImageFiles):
    """Images of classes; those of one class are positives of each other."""

    classes: list[int]
    names: list[str]  # of the classes
    templates: list[str]

    def image_id(self, i: int) -> int:
        return stable_hash(self.paths[i])

    def all_captions(self, i: int) -> list[str]:
        """The name of its class in every template."""
        return [template.replace("{}", self.names[self.classes[i]]) for template in self.templates]

    def label(self, i: int, caption: str) -> int:
        return self.classes[i]

    def take(self, indices: list[int]) -> "ClassFolder":
        paths, classes = [self.paths[i] for i in indices], [self.classes[i] for i in indices]
        return ClassFolder(paths, classes, self.names, self.templates)

    def held_out(self, max_broken: float) -> EvalSet:
        """All of them to measure a model on, captioned by the first template."""
        captions = [self.all_captions(i)[:1] for i in range(len(self))]
        return EvalSet(self, range(len(self)), captions, self.classes, max_broken, labels_match=True)


def open_classes(config: DataConfig, seed: int) -> PairData:
    """Images of the folder `config.data`, which has a folder for each class, in their order by name; `seed` is that of
    the split of each class. Raises ValueError for no such folder, no images, or names and templates that do not fit."""
    folder = Path(config.data).expanduser()
    folders = _folders(folder)
    names = class_names(folder, folders, config.class_names)
    templates = caption_templates(folder, config.templates)
    images = _images(folder, folders, names, templates, "data")
    data = PairData(config.data, len(images), images, None, config.max_broken, names, templates)
    if config.val_data is not None:
        other = Path(config.val_data).expanduser()
        unknown = sorted(set(_folders(other)) - set(folders))
        what = "val_data must have classes of {!r} alone, got the folder {}"
        require("data", not unknown, what, config.data, *unknown[:1])
        val = _images(other, folders, names, templates, "val_data")
        check_disjoint(images.paths, val.paths)
    else:
        train, held_out = split_stratified(images.classes, config.val_fraction, seed)
        if not held_out:
            return data
        images, val = images.take(train), images.take(held_out)
    return replace(data, num_train=len(images), source=images, val=val.held_out(config.max_broken))


def open_labelled(train: str, test: str) -> tuple[ClassFolder, ClassFolder]:
    """Images of two folders, which have a folder for each class; those of the second are among the first's, and counted
    alike. Raises ValueError for no such folders, no images, an unknown class, or an image that is in both."""
    known, other = Path(train).expanduser(), Path(test).expanduser()
    folders = _folders(known)
    unknown = sorted(set(_folders(other)) - set(folders))
    require("data", not unknown, "{!r} must have classes of {!r} alone, got the folder {}", test, train, *unknown[:1])
    sides = [_images(at, folders, folders, [TEMPLATE], "data") for at in (known, other)]
    shared = set(real_paths(sides[0].paths)) & set(real_paths(sides[1].paths))
    what = "{!r} and {!r} must share no images, got {} in both, the first is {}"
    require("data", not shared, what, train, test, len(shared), min(shared, default=""))
    return sides[0], sides[1]


def _folders(folder: Path) -> list[str]:
    require("data", folder.is_dir(), "data must be an existing folder of classes, got {!r}", str(folder))
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    what = "{!r} must have a folder of images for each class, got none"
    require("data", bool(found), what, str(folder))
    return found


def _images(folder: Path, folders: Sequence[str], names: list[str], templates: list[str], argument: str) -> ClassFolder:
    """Of every class, the images in its folder and in those below."""
    paths, classes = [], []
    for place, name in enumerate(folders):
        own = [os.path.join(at, file) for at, _, files in os.walk(folder / name, followlinks=True) for file in files]
        own = sorted(path for path in own if path.lower().endswith(SUFFIXES))
        paths += own
        classes += [place] * len(own)
    what = "{}={!r} must hold images ({}) in the folders of its classes, got none in {} of them"
    require("data", bool(paths), what, argument, str(folder), " ".join(SUFFIXES), len(folders))
    return ClassFolder(paths, classes, names, templates)


def class_names(folder: Path, folders: Sequence[str], given: str | None) -> list[str]:
    """Names of the classes of `folders`.

    They are of the file `given`, 'openai' for CLIP's of ImageNet, or, None, of a file beside the folders
    (`classnames.txt`, ImageNet's mappings) or the folders' own. A file has a name a line in their order, or folder and
    name; or is JSON, {folder: name} or {index: [folder, name]}. Raises ValueError where a class has no name.
    """
    are_synsets = all(_SYNSET.fullmatch(name) for name in folders)
    if given == OPENAI:
        names = list(_open_clip(f"--class-names {OPENAI}").IMAGENET_CLASSNAMES)
        fits = len(folders) == len(names) == _NUM_IMAGENET and are_synsets
        what = "class_names 'openai' must be of ImageNet's 1,000 synset folders, got {} folders such as {!r}"
        require("data", fits, what, len(folders), folders[0])
        return names
    beside = (place / name for place in (folder, folder.parent) for name in _NAMES)
    file = Path(given).expanduser() if given is not None else next(filter(Path.is_file, beside), None)
    if file is None:
        what = "class_names must be given of synset folders such as {!r}: a file, or 'openai'"
        require("data", not are_synsets, what, folders[0])
        return [name.replace("_", " ") for name in folders]
    require("data", file.is_file(), "class_names must be an existing file or 'openai', got {!r}", str(file))
    names = _read_names(file, folders)
    missing = [name for name in folders if not names.get(name)]
    what = "class_names must name every class, but {} has none for {} of {} folders, such as {!r}"
    require("data", not missing, what, file, len(missing), len(folders), *missing[:1])
    return [names[name] for name in folders]


def _read_names(file: Path, folders: Sequence[str]) -> dict[str, str]:
    """Names by folder."""
    text = _text(file, "class_names")
    if file.suffix == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"data: class_names must be JSON, got {str(file)!r}: {error}") from None
        pairs: list[Any] = list(content.values()) if isinstance(content, dict) else []
        if pairs and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            content = dict(pairs)
        if isinstance(content, list):
            lines = [str(name) for name in content]
        else:
            holds = isinstance(content, dict) and all(isinstance(name, str) for name in content.values())
            what = "class_names must hold folders and their names, or a list of names, got {!r}"
            require("data", holds, what, str(file))
            return {key: _first(name) for key, name in content.items()}
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    split = [re.split(r"[\t ,:]\s*", line, maxsplit=1) for line in lines]
    keyed = {parts[0]: _first(parts[1]) for parts in split if len(parts) == 2}
    if sum(name in keyed for name in folders) * 2 > len(folders):
        return keyed
    what = "class_names must have a line for each of {} folders in their order, or with each folder, got {} in {}"
    require("data", len(lines) == len(folders), what, len(folders), len(lines), file)
    return dict(zip(folders, lines, strict=True))


def _first(names: str) -> str:
    """Of synonyms, as ImageNet's mappings have them."""
    return names.split(",")[0].strip().replace("_", " ")


def caption_templates(folder: Path, given: str | None) -> list[str]:
    """Captions with '{}' in place of a class's name: the lines of the file `given`, '{c}' meaning the same; 'openai',
    CLIP's 80 of ImageNet; or, None, those of a `templates.txt` beside the folders, or one. Raises ValueError for a line
    without a place for the name."""
    if given == OPENAI:
        return [template("{}") for template in _open_clip(f"--templates {OPENAI}").OPENAI_IMAGENET_TEMPLATES]
    beside = (folder / name for name in _TEMPLATES)
    file = Path(given).expanduser() if given is not None else next(filter(Path.is_file, beside), None)
    if file is None:
        return [TEMPLATE]
    require("data", file.is_file(), "templates must be an existing file or 'openai', got {!r}", str(file))
    lines = [line.strip().replace("{c}", "{}") for line in _text(file, "templates").splitlines() if line.strip()]
    wrong = [line for line in lines if "{}" not in line]
    require("data", bool(lines), "templates must be a line each, got none in {}", file)
    require("data", not wrong, "templates must hold {{}} for the class name, got {!r} in {}", *wrong[:1], file)
    return lines


def _text(file: Path, argument: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {argument} must be text in UTF-8, got {str(file)!r}: {error}") from None


@cache
def _open_clip(asked: str) -> ModuleType:
    """open_clip's module of names and templates, alone: the package itself is not imported."""
    package = importlib.util.find_spec("open_clip")
    folders = [] if package is None else package.submodule_search_locations or []
    file = next((path for path in (Path(x, "zero_shot_metadata.py") for x in folders) if path.is_file()), None)
    if file is None:
        raise ValueError(f"{asked} must find open_clip, which is not here: pip install open_clip_torch, or give a file")
    spec = importlib.util.spec_from_file_location("_open_clip_zero_shot_metadata", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
