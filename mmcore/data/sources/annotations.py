"""Captions and questions of JSON files with their images: found, checked and split."""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from mmcore.data.broken import BrokenTally
from mmcore.data.config import DataConfig
from mmcore.data.pair_data import PairData
from mmcore.data.sources.files import FilePairs, check_disjoint, some_of
from mmcore.data.sources.json_formats import JsonFile, read_json, records
from mmcore.data.sources.questions import Question, QuestionSet
from mmcore.data.sources.split import split_pairs
from mmcore.ops import require

# COCO_train2014_000000123456.jpg, 000000123456.jpg and 123456.png are image 123456.
_NUMBERED = re.compile(r"(?:.*\D)?(\d+)\.(?:jpe?g|png|webp)", re.IGNORECASE)


Texts = FilePairs | QuestionSet
"""Captions, or else questions, with the image of each."""


def open_json(config: DataConfig, seed: int) -> PairData:
    """Captions or questions of `config.data`: LAVIS's, COCO's, VQAv2's or ScienceQA's JSON, told apart by its content;
    `seed` is that of the split, unless the file itself tells what is to train on and to test. Raises ValueError for a
    missing file, an unknown format, no image found, too many broken records, or an image in both training and held-out
    data."""
    is_used = config.val_annotations is None or config.val_data is not None
    what = "val_annotations={!r} has no effect without val_data, leave it out"
    require("data", is_used, what, config.val_annotations)
    train, broken, split = _read(config.data, "data", config.annotations, config)
    if config.val_data is not None:
        val, broken_val, _ = _read(config.val_data, "val_data", config.val_annotations, config)
        _check_sides(train, val, config)
        broken = broken + broken_val
    elif {"train", "test"} <= {*split}:
        train, val = (_take(train, [i for i, x in enumerate(split) if x == side]) for side in ("train", "test"))
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


def _files(texts: Texts) -> FilePairs:
    files = texts.source if isinstance(texts, QuestionSet) else texts
    assert isinstance(files, FilePairs)
    return files


def _take(texts: Texts, indices: list[int]) -> Texts:
    files = _files(texts).take(indices)
    if isinstance(texts, QuestionSet):
        return replace(texts, source=files, questions=[texts.questions[i] for i in indices])
    return files


def _check_sides(train: Texts, val: Texts, config: DataConfig) -> None:
    """Raise a ValueError where held-out data is of another kind, or shares images with the training data."""
    ours, theirs = ("questions" if isinstance(side, QuestionSet) else "captions" for side in (train, val))
    what = "val_data must hold {} as data does, but {!r} holds {}"
    require("data", ours == theirs, what, ours, config.val_data, theirs)
    check_disjoint(_files(train).paths, _files(val).paths)


def _read(
    path: str, argument: str, answers_path: str | None, config: DataConfig
) -> tuple[Texts, Counter[str], list[str]]:
    """What a file holds, what of it is broken, and the split that it puts each text into, "" for none."""
    file = read_json(path, argument)
    answers = _read_answers(file, answers_path, "val_annotations" if argument == "val_data" else "annotations")
    tally = BrokenTally(config.max_broken, file.what)
    images: list[str | int | None] = []
    image_ids: list[str | None] = []
    texts: list[str | Question] = []
    splits: list[str] = []
    undigested, parse = records(file, answers)
    kind = "caption" if file.format.endswith("captions") else "question"
    for number, entry in enumerate(undigested):
        with tally.record(f"{Path(path).name}, {kind} {number}"):
            record = parse(number, entry)
            images.append(record.image)
            image_ids.append(record.image_id)
            texts.append(record.text)
            splits.append(record.split)
    tally.check(final=True)
    require("data", bool(images), "{} must hold at least one {}, got none", file.what, kind)
    paths = _find_images(images, file, config.image_root)
    identities: dict[str, str] = {}
    for where, name, image_id in zip(paths, images, image_ids, strict=True):
        # Not the path: ranks may have the images in different places.
        identities.setdefault(where, image_id or str(name))
    own = [image_id if name is None else None for name, image_id in zip(images, image_ids, strict=True)]
    questions = [text for text in texts if isinstance(text, Question)]
    captions = [text.text if isinstance(text, Question) else text for text in texts]
    files = FilePairs(paths, [x or identities[where] for where, x in zip(paths, own, strict=True)], captions)
    if kind == "caption":
        return files, tally.counts, splits
    return QuestionSet(path, files, questions, derived=False, max_broken=config.max_broken), tally.counts, splits


def _read_answers(file: JsonFile, path: str | None, argument: str) -> JsonFile | None:
    """VQAv2's annotations for VQAv2's questions, None for all other files."""
    what = "{} holds VQAv2's annotations: give VQAv2's questions there, and this file as {}"
    require("data", file.format != "VQAv2 annotations", what, file.what, argument)
    if file.format != "VQAv2 questions":
        what = "{}={!r} has no effect on {}, which holds {}, leave it out"
        require("data", path is None, what, argument, path, file.what, file.format)
        return None
    if path is None:
        what = f"{file.what} holds VQAv2's questions, so {argument} must be given, the file with the answers"
        raise ValueError(f"data: {what}")
    answers = read_json(path, argument)
    what = "{} must hold VQAv2's annotations, but holds {}"
    require("data", answers.format == "VQAv2 annotations", what, answers.what, answers.format)
    return answers


def _find_images(images: list[str | int | None], file: JsonFile, image_root: str | None) -> list[str]:
    """Path of each image, by name or by number, "" of None: in `image_root`, which by default is the folder of the JSON
    file, or else in a folder right below it."""
    root = Path(file.path).parent if image_root is None else Path(image_root).expanduser()
    require("data", root.is_dir(), "image_root must be an existing folder, got {!r}", str(root))
    below = sorted(path for path in root.iterdir() if path.is_dir())
    numbers = {image for image in images if isinstance(image, int)}
    if numbers:
        named = _numbered_images([root], numbers) or _numbered_images(below, numbers)
        what = "image_root must hold the images of {} by their numbers, such as COCO_train2014_{:012d}.jpg, but {} has "
        require("data", bool(named), what + "none of {}", file.what, min(numbers), root, len(numbers))
        # A name that does not exist counts as a missing file where it is read.
        return [named.get(image) or str(root / f"{image}.jpg") for image in images if isinstance(image, int)]
    names = [image for image in images if isinstance(image, str)]
    if not names:
        return [""] * len(images)
    probed = some_of(names)
    for folder in (root, *below):
        if any((folder / name).is_file() for name in probed):
            return [str(folder / name) if isinstance(name, str) else "" for name in images]
    what = f"image_root must be the folder of the images of {file.what}, but none of {len(probed)} tried exists"
    raise ValueError(f"data: {what}, the first is {root / probed[0]}")


def _numbered_images(folders: list[Path], numbers: set[int]) -> dict[int, str]:
    """Paths of the images in `folders` whose names end in one of `numbers`, by number."""
    found: dict[int, str] = {}
    for path in (folder / name for folder in folders for name in sorted(os.listdir(folder))):
        match = _NUMBERED.fullmatch(path.name)
        number = int(match[1]) if match else None
        if number is not None and number in numbers:
            other = found.setdefault(number, str(path))
            what = "image_root must hold one image of each number, got {} and {}"
            require("data", other == str(path), what, other, path)
    return found
