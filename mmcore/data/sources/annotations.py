"""Captions and questions of JSON files with their images: found, checked and split."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from mmcore.data.broken import BrokenTally
from mmcore.data.config import DataConfig
from mmcore.data.pair_data import PairData
from mmcore.data.sources.files import FilePairs, ImageFiles
from mmcore.data.sources.json_formats import JsonFile, read_json, records
from mmcore.data.sources.questions import Question, QuestionSet
from mmcore.data.sources.split import split_pairs

_NUM_PROBED = 100
# COCO_train2014_000000123456.jpg, 000000123456.jpg and 123456.png are image 123456.
_NUMBERED = re.compile(r"(?:.*\D)?(\d+)\.(?:jpe?g|png|webp)", re.IGNORECASE)


Texts = FilePairs | QuestionSet
"""Captions, or else questions, with the image of each."""


def open_json(config: DataConfig, seed: int) -> PairData:
    """Captions or questions of `config.data`: LAVIS's, COCO's or VQAv2's JSON, told apart by its content.

    Args:
        config: `data`, `annotations` and `image_root`; `val_data` with `val_annotations`, or `val_fraction`.
        seed: seed of the split.

    Raises:
        ValueError: a missing file, an unknown format, no image found, too many broken records, or an image in
            both training and held-out data.
    """
    if config.val_annotations is not None and config.val_data is None:
        raise ValueError(
            f"data: val_annotations={config.val_annotations!r} has no effect without val_data, leave it out"
        )
    train, broken = _read(config.data, "data", config.annotations, config)
    if config.val_data is not None:
        val, broken_val = _read(config.val_data, "val_data", config.val_annotations, config)
        _check_sides(train, val, config)
        broken = broken + broken_val
    else:
        # The same question is asked about many images, so that images alone tell the sides apart.
        texts = train.texts if isinstance(train, FilePairs) else range(len(train))
        sides = split_pairs(_files(train).identities, texts, config.val_fraction, seed)
        train, val = (_take(train, side) for side in sides)
    data = PairData(config.data, len(train), None, None, config.max_broken, broken=broken)
    if isinstance(train, QuestionSet):
        assert isinstance(val, QuestionSet)
        return replace(data, questions=train, val_questions=val if len(val) else None)
    assert isinstance(val, FilePairs)
    return replace(data, source=train, val=val.held_out(config.max_broken) if len(val) else None)


def _files(texts: Texts) -> ImageFiles:
    files = texts.source if isinstance(texts, QuestionSet) else texts
    assert isinstance(files, ImageFiles)
    return files


def _take(texts: Texts, indices: list[int]) -> Texts:
    files = _files(texts).take(indices)
    if isinstance(texts, QuestionSet):
        return replace(texts, source=files, questions=[texts.questions[i] for i in indices])
    assert isinstance(files, FilePairs)
    return files


def _check_sides(train: Texts, val: Texts, config: DataConfig) -> None:
    """Raise a ValueError where held-out data is of another kind, or shares images with the training data."""
    kinds = ["questions" if isinstance(side, QuestionSet) else "captions" for side in (train, val)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"data: val_data must hold {kinds[0]} as data does, but {config.val_data!r} holds {kinds[1]}")
    shared = sorted(_real_paths(_files(val).paths) & _real_paths(_files(train).paths))
    if shared:
        raise ValueError(
            f"data: val_data must not share images with data, got {len(shared)} in both, the first is {shared[0]}"
        )


def _real_paths(paths: list[str]) -> set[str]:
    """The paths without symbolic links to folders; those of each file would take minutes."""
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    return {os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in paths}


def _read(path: str, argument: str, answers_path: str | None, config: DataConfig) -> tuple[Texts, Counter[str]]:
    file = read_json(path, argument)
    answers = _read_answers(file, answers_path, "val_annotations" if argument == "val_data" else "annotations")
    tally = BrokenTally(config.max_broken, file.what)
    images: list[str | int] = []
    image_ids: list[str | None] = []
    captions: list[str] = []
    questions: list[Question] = []
    undigested, parse = records(file, answers)
    kind = "caption" if file.format.endswith("captions") else "question"
    for number, entry in enumerate(undigested):
        with tally.record(f"{Path(path).name}, {kind} {number}"):
            record = parse(number, entry)
            images.append(record.image)
            image_ids.append(record.image_id)
            if isinstance(record.text, str):
                captions.append(record.text)
            else:
                questions.append(record.text)
    tally.check(final=True)
    if not images:
        raise ValueError(f"data: {file.what} must hold at least one {kind}, got none")
    paths = _find_images(images, file, config.image_root)
    identities: dict[str, str] = {}
    for where, name, image_id in zip(paths, images, image_ids, strict=True):
        # Not the path: ranks may have the images in different places.
        identities.setdefault(where, image_id or str(name))
    files = paths, [identities[where] for where in paths]
    if kind == "caption":
        return FilePairs(*files, captions), tally.counts
    return QuestionSet(path, ImageFiles(*files), questions, derived=False, max_broken=config.max_broken), tally.counts


def _read_answers(file: JsonFile, path: str | None, argument: str) -> JsonFile | None:
    """VQAv2's annotations for VQAv2's questions, None for all other files."""
    if file.format == "VQAv2 annotations":
        raise ValueError(
            f"data: {file.what} holds VQAv2's annotations: give VQAv2's questions there, and this file as {argument}"
        )
    if file.format != "VQAv2 questions":
        if path is not None:
            raise ValueError(
                f"data: {argument}={path!r} has no effect on {file.what}, which holds {file.format}, leave it out"
            )
        return None
    if path is None:
        raise ValueError(
            f"data: {file.what} holds VQAv2's questions, so {argument} must be given, the file with the answers"
        )
    answers = read_json(path, argument)
    if answers.format != "VQAv2 annotations":
        raise ValueError(f"data: {answers.what} must hold VQAv2's annotations, but holds {answers.format}")
    return answers


def _find_images(images: list[str | int], file: JsonFile, image_root: str | None) -> list[str]:
    """Path of each image, by name or by number: in `image_root`, or else in a folder right below it.

    By default, `image_root` is the folder of the JSON file.

    Raises:
        ValueError: no such folder, or none of the images in it; two files of the same number.
    """
    root = Path(file.path).parent if image_root is None else Path(image_root).expanduser()
    if not root.is_dir():
        raise ValueError(f"data: image_root must be an existing folder, got {str(root)!r}")
    below = sorted(path for path in root.iterdir() if path.is_dir())
    numbers = {image for image in images if isinstance(image, int)}
    if numbers:
        named = _numbered_images([root], numbers) or _numbered_images(below, numbers)
        if not named:
            raise ValueError(
                f"data: image_root must hold the images of {file.what} by their numbers, such as "
                f"COCO_train2014_{min(numbers):012d}.jpg, but {root} has none of {len(numbers)}"
            )
        # A name that does not exist counts as a missing file where it is read.
        return [named.get(image) or str(root / f"{image}.jpg") for image in images if isinstance(image, int)]
    names = [image for image in images if isinstance(image, str)]
    probed = names[:: max(1, len(names) // _NUM_PROBED)]
    for folder in (root, *below):
        if any((folder / name).is_file() for name in probed):
            path_of = {name: str(folder / name) for name in names}
            return [path_of[name] for name in names]
    raise ValueError(
        f"data: image_root must be the folder of the images of {file.what}, but none of {len(probed)} tried "
        f"exists, the first is {root / probed[0]}"
    )


def _numbered_images(folders: list[Path], numbers: set[int]) -> dict[int, str]:
    """Paths of the images in `folders` whose names end in one of `numbers`, by number."""
    found: dict[int, str] = {}
    for path in (folder / name for folder in folders for name in sorted(os.listdir(folder))):
        match = _NUMBERED.fullmatch(path.name)
        number = int(match[1]) if match else None
        if number is None or number not in numbers:
            continue
        if number in found:
            raise ValueError(f"data: image_root must hold one image of each number, got {found[number]} and {path}")
        found[number] = str(path)
    return found
