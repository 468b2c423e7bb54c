"""Small data sets on disk, and a stand-in for the tokenizer, for the tests of `mmcore.data`."""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmcore.data import Batch, LoaderSpec, TrainLoader


def fake_tokenizer(captions: list[str]) -> Tensor:
    """int64 [B, 2]: length and checksum of each caption."""
    return torch.tensor([[len(c), zlib.crc32(c.encode())] for c in captions])


def image_bytes(number: int, size: tuple[int, int] = (20, 14), kind: str = "PNG") -> bytes:
    """An encoded image whose gradient tells `number`."""
    image = Image.new("RGB", size)
    image.putdata(
        [
            ((x * 9 + number * 37) % 256, (y * 13 + number * 59) % 256, (number * 7) % 256)
            for y in range(size[1])
            for x in range(size[0])
        ]
    )
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """A tar of named members; a TarInfo in place of a name is written as it is."""
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


def write_table(
    folder: Path, rows: Sequence[Sequence[str]], separator: str = "\t", name: str = "pairs.csv"
) -> str:
    """A table of `rows`, the first of them the header."""
    path = folder / name
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return str(path)


def write_pairs(folder: Path, num_pairs: int, size: tuple[int, int] = (20, 14)) -> str:
    """Images and a table of them in open_clip's form; captions all different."""
    (folder / "images").mkdir()
    rows = [["filepath", "title"]]
    for i in range(num_pairs):
        (folder / "images" / f"{i}.png").write_bytes(image_bytes(i, size))
        rows.append([f"images/{i}.png", f"thing number {i}"])
    return write_table(folder, rows)


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
        (place / f"{i}.txt").write_text(
            f"{english}\nzh.utf8=wrong\naf.utf8='n Ding {i}.\n{chinese}zh_TW.utf8=東西\n"
        )
    Image.new("RGB", (5, 5)).save(folder / "food" / "0_mirror.png")
    return folder


def spec(batch_size: int = 4, rank: int = 0, world_size: int = 1, **rest) -> LoaderSpec:
    """A LoaderSpec of small images."""
    return LoaderSpec(
        image_size=rest.pop("image_size", 8),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=rest.pop("seed", 3),
        workers=rest.pop("workers", 0),
        augment=rest.pop("augment", True),
    )


def take(loader: TrainLoader, steps: int) -> list[Batch]:
    """The next `steps` batches."""
    return [next(loader) for _ in range(steps)]


def digest(loader: TrainLoader, steps: int) -> str:
    """Checksum of all that the next `steps` batches hold."""
    sha = hashlib.sha256()
    for batch in take(loader, steps):
        sha.update(repr(batch.ids).encode())
        for tensor in (batch.images, batch.tokens, batch.labels):
            sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def assert_equal_batches(got: Sequence[Batch], want: Sequence[Batch]) -> None:
    """Bit equality of everything in the batches."""
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.ids == b.ids
        assert a.epoch == b.epoch
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.labels, b.labels)
