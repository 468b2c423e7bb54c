"""Small data sets on disk, and a stand-in for the tokenizer, for the tests of `mmcore.data`."""

import csv
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmcore.data import DataConfig, LoaderSpec, PairData, Preprocess, Reader, TrainLoader, open_data
from mmcore.data.collate import collate_pairs, pair_sample


def fake_tokenizer(captions: list[str]) -> Tensor:
    """int64 [B, 2]: length and checksum of each caption."""
    return torch.tensor([[len(c), zlib.crc32(c.encode())] for c in captions])


def image_bytes(number: int, size: tuple[int, int] = (20, 14), kind: str = "PNG") -> bytes:
    """An encoded image whose gradient tells `number`."""
    image, places = Image.new("RGB", size), ((x, y) for y in range(size[1]) for x in range(size[0]))
    image.putdata([((x * 9 + number * 37) % 256, (y * 13 + number * 59) % 256, (number * 7) % 256) for x, y in places])
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """A tar of named members; a TarInfo in place of a name is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if isinstance(name, str):
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, num_shards: int, per_shard: int) -> str:
    """Shards of pairs 's{shard}_{i}', and the brace pattern that names them."""
    for shard in range(num_shards):
        members = []
        for i in range(per_shard):
            number = shard * per_shard + i
            suffix, kind = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))[number % 3]
            members.append((f"s{shard}_{i}.{suffix}", image_bytes(number, kind=kind)))
            members.append((f"s{shard}_{i}.txt", f"caption number {number}\n".encode()))
        write_tar(folder / f"{shard:03d}.tar", members)
    return str(folder / f"{{000..{num_shards - 1:03d}}}.tar")


def write_table(folder: Path, rows: Sequence[Sequence[str]], separator: str = "\t", name: str = "pairs.csv") -> str:
    """A table of `rows`, the first of them the header."""
    path = folder / name
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return str(path)


def write_pairs(folder: Path, num_pairs: int, size: tuple[int, int] = (20, 14)) -> str:
    """Images and a table of them in open_clip's form; captions all different."""
    (folder / "images").mkdir(parents=True)
    rows = [["filepath", "title"]]
    for i in range(num_pairs):
        (folder / "images" / f"{i}.png").write_bytes(image_bytes(i, size))
        rows.append([f"images/{i}.png", f"thing number {i}"])
    return write_table(folder, rows)


def write_images(folder: Path, names: Sequence[str]) -> None:
    """Images of these names, all different; their folders are made."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if name.endswith("jpg") else "PNG"
        (folder / name).write_bytes(image_bytes(number, kind=kind))


def write_json(path: Path, content: object) -> str:
    """A JSON file, and its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def write_lavis(folder: Path, num_images: int) -> str:
    """LAVIS's captions of as many images, one each; without image_id, which is that of the image then."""
    names = [f"val2014/COCO_val2014_{i:012d}.jpg" for i in range(num_images)]
    write_images(folder, names)
    records = [{"image": name, "caption": f"thing number {i}"} for i, name in enumerate(names)]
    return write_json(folder / "karpathy.json", records)


def write_lavis_questions(folder: Path, num_images: int) -> str:
    """Two of each image, with three answers."""
    write_images(folder, [f"{i}.jpg" for i in range(num_images)])
    answers = [["a", "a", f"b{i}"] for i in range(num_images)]
    records = [
        {"image": f"{i}.jpg", "question": f"question {k}?", "answer": answers[i], "question_id": 2 * i + k}
        for i in range(num_images)
        for k in range(2)
    ]
    return write_json(folder / "questions.json", records)


def write_coco(folder: Path, num_images: int, captions_each: int = 1, first: int = 0) -> str:
    """COCO's captions of images `first` and so on, in turns: the captions of an image do not lie together."""
    numbers = range(first, first + num_images)
    write_images(folder, [f"{i}.jpg" for i in numbers])
    images = [{"id": i, "file_name": f"{i}.jpg", "license": 3, "height": 14, "width": 20} for i in numbers]
    annotations = [
        {"image_id": i, "id": 1000 * turn + i, "caption": f"thing {i}, said {turn} times"}
        for turn in range(captions_each)
        for i in numbers
    ]
    content = {"info": {"year": 2014}, "images": images, "annotations": annotations, "licenses": []}
    return write_json(folder / f"captions{first}.json", content)


def write_vqa(folder: Path, num_images: int, split: str = "train", first: int = 0) -> tuple[str, str]:
    """VQAv2's questions and annotations, two of each image `first` and so on, which lie in a folder of their own."""
    numbers = range(first, first + num_images)
    write_images(folder, [f"{split}2014/COCO_{split}2014_{i:012d}.jpg" for i in numbers])
    questions, annotations = [], []
    for i in numbers:
        for k, (question, answers, answer_type) in enumerate(
            (("How many?", [str(i)] * 7 + ["many"] * 3, "number"), ("Is it?", ["yes"] * 10, "yes/no"))
        ):
            ids = {"image_id": i, "question_id": 10 * i + k}
            questions.append({**ids, "question": question})
            given = [{"answer": a, "answer_confidence": "maybe", "answer_id": n} for n, a in enumerate(answers, 1)]
            types = {"question_type": question.split()[0].lower(), "answer_type": answer_type}
            annotations.append({**ids, **types, "multiple_choice_answer": answers[0], "answers": given})
    head = {"info": {}, "license": {}, "data_subtype": f"{split}2014"}
    return (
        write_json(folder / f"{split}_questions.json", {**head, "task_type": "Open-Ended", "questions": questions}),
        write_json(folder / f"{split}_annotations.json", {**head, "annotations": annotations[::-1]}),
    )


def write_stamps(folder: Path) -> Path:
    """13 stamps in the package's form: one caption twice, one without Chinese, and a mirrored picture."""
    for i in range(13):
        place = folder / ("animals/birds" if i % 2 else "food")
        place.mkdir(parents=True, exist_ok=True)
        transparent = Image.new("RGBA", (30 + i, 12), (255, 0, 0, 0))
        transparent.paste((0, 0, 200, 255), (4, 4, 8, 8))
        transparent.save(place / f"{i}.png")
        english = "A thing, twice." if i in (3, 8) else f"Thing {i}."
        chinese = "" if i == 5 else f"zh_CN.utf8=东西{i}。\n"
        (place / f"{i}.txt").write_text(f"{english}\nzh.utf8=wrong\naf.utf8='n Ding {i}.\n{chinese}zh_TW.utf8=東西\n")
    Image.new("RGB", (5, 5)).save(folder / "food" / "0_mirror.png")
    return folder


@dataclass(frozen=True)
class PairSpec(LoaderSpec):
    """How pairs are read, and what becomes of their images."""

    image_size: int = 8
    augment: bool = True


def spec(batch_size: int = 4, rank: int = 0, world_size: int = 1, seed: int = 3, **rest) -> PairSpec:
    """Of small images."""
    return PairSpec(batch_size, rank, world_size, seed, **rest)


def opened(data: object = "digits", seed: int = 0, **config: Any) -> PairData:
    """By its name, a file's too."""
    return open_data(DataConfig(data=str(data), **config), seed=seed)


def opened_json(path: Path, content: object, **config: Any) -> PairData:
    """All of a JSON file, of which nothing is held out."""
    return opened(write_json(path, content), val_fraction=0.0, **config)


def opened_kind(kind: str, folder: Path, **config: Any) -> PairData:
    """Small data of each kind."""
    if kind == "stamps":
        return opened("stamps", stamps_dir=write_stamps(folder / "stamps"), **config)
    if kind == "vqa":
        questions, annotations = write_vqa(folder, 12)
        return opened(questions, annotations=annotations, **config)
    writers = {"csv": partial(write_pairs, folder, 17), "lavis": partial(write_lavis, folder, 17)}
    writers |= {"coco": partial(write_coco, folder, 17), "shards": partial(write_shards, folder, 5, 6)}
    writers |= {"lavis questions": partial(write_lavis_questions, folder, 12)}
    return opened(writers[kind]() if kind in writers else kind, **config)


class PairLoader:
    """A loader of pairs whose batches have one part each, with its epoch and ids."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __next__(self) -> Any:
        step = next(self.loader)
        [part] = step.parts
        return SimpleNamespace(**vars(part), epoch=step.epoch, ids=step.ids)


def pair_reader(asked: PairSpec, tokenizer: Any) -> Reader:
    sample = partial(pair_sample, preprocess=Preprocess(asked.image_size), augment=asked.augment)
    return Reader(sample, partial(collate_pairs, tokenizer=tokenizer))


def train_loader(data: PairData, asked: PairSpec, tokenizer: Any) -> PairLoader:
    return PairLoader(data.train_loader(asked, pair_reader(asked, tokenizer)))


def question_loader(data: PairData, asked: PairSpec, tokenizer: Any) -> PairLoader:
    return PairLoader(data.question_loader(asked, pair_reader(asked, tokenizer)))


def take(loader: PairLoader, steps: int) -> list[Any]:
    """The next `steps` batches."""
    return [next(loader) for _ in range(steps)]


def digest(loader: PairLoader, steps: int) -> str:
    """Checksum of all that the next `steps` batches hold."""
    sha = hashlib.sha256()
    for batch in take(loader, steps):
        sha.update(repr((batch.ids, batch.captions, batch.questions)).encode())
        for tensor in (batch.images, batch.tokens, batch.labels, batch.image_ids):
            sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def assert_equal_batches(got: Sequence[Any], want: Sequence[Any]) -> None:
    """Bit equality of everything in the batches."""
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.ids == b.ids and a.epoch == b.epoch and a.captions == b.captions and a.questions == b.questions
        assert torch.equal(a.images, b.images) and torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.image_ids, b.image_ids)
