"""Images as regions: features and boxes, of a detector's rows or of a grid's cells, and regions that are hidden."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.files import FILE
from mmcore.data.transforms.images import Preprocess, normalized
from mmcore.ops import require

TSV_FIELDS = (
    *("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
    *("num_boxes", "boxes", "features"),
)
"""Columns of bottom-up attention's rows as LXMERT publishes them."""
_OF_OBJECTS = ("objects_id", "objects_conf", "attrs_id", "attrs_conf")


class Objects(NamedTuple):
    """What a detector takes regions for, int64 [B, N], and how sure it is, float32 [B, N], which is 0 where padded."""

    objects: Tensor
    object_scores: Tensor
    attributes: Tensor
    attribute_scores: Tensor


class Regions(NamedTuple):
    """Regions of images, padded at their end.

    Args:
        features: float32 [B, N, F].
        boxes: float32 [B, N, 4], left, top, right and bottom, as shares of the image's sides.
        counts: int64 [B], how many are no padding.
        objects: what they were taken for; None = no detector says.
    """

    features: Tensor
    boxes: Tensor
    counts: Tensor
    objects: Objects | None = None

    def to(self, device: torch.device | str) -> "Regions":
        objects = None if self.objects is None else Objects(*(x.to(device) for x in self.objects))
        return Regions(self.features.to(device), self.boxes.to(device), self.counts.to(device), objects)

    def take(self, images: Sequence[int]) -> "Regions":
        """Those of some images, in any order."""
        index = torch.tensor(images, dtype=torch.int64, device=self.counts.device)
        objects = None if self.objects is None else Objects(*(x[index] for x in self.objects))
        return Regions(self.features[index], self.boxes[index], self.counts[index], objects)

    @classmethod
    def joined(cls, parts: Sequence["Regions"]) -> "Regions":
        """Those of all parts, padded to the longest."""
        most = max(x.features.shape[1] for x in parts)

        def padded(name: str, of: Any) -> Tensor:
            found = [getattr(x, name) for x in of]
            return torch.cat([F.pad(x, (0, 0) * (x.ndim - 2) + (0, most - x.shape[1])) for x in found])

        objects = None
        if all(x.objects is not None for x in parts):
            objects = Objects(*(padded(name, [x.objects for x in parts]) for name in Objects._fields))
        counts = torch.cat([x.counts for x in parts])
        return cls(padded("features", parts), padded("boxes", parts), counts, objects)


@dataclass(frozen=True)
class GridRegions:
    """What a model wants of an image where there is no detector: the cells of a square one, their pixels, normalised,
    as features, with their boxes.

    Args:
        square: what becomes of an image.
        cell: pixels a side, which divides the square's.
    """

    square: Preprocess
    cell: int

    def __post_init__(self) -> None:
        fits = self.cell >= 1 and self.square.size % self.cell == 0
        require("GridRegions", fits, "cell must divide the image's {} pixels, got {}", self.square.size, self.cell)

    @property
    def width(self) -> int:
        """F, of a region's features."""
        return 3 * self.cell**2

    def __call__(self, images: Sequence[Image.Image]) -> Regions:
        """RGB images as evaluation sees them."""
        return self.cells(self.square(images))

    def cells(self, pixels: Tensor) -> Regions:
        """Of uint8 [B, 3, S, S]."""
        side = pixels.shape[-1] // self.cell
        x = normalized(pixels, self.square.mean, self.square.std)
        x = x.unflatten(3, (side, self.cell)).unflatten(2, (side, self.cell))  # [B, 3, h, P, w, P]
        features = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        low = torch.arange(side) / side
        top, left = low.repeat_interleave(side), low.repeat(side)
        boxes = torch.stack([left, top, left + 1 / side, top + 1 / side], 1)
        counts = torch.full((len(pixels),), side**2)
        return Regions(features, boxes.expand(len(pixels), -1, -1).contiguous(), counts)

    @property
    def summary(self) -> str:
        """For the reader."""
        num = (self.square.size // self.cell) ** 2
        return f"{num} cells of {self.cell} pixels as regions; {self.square.summary}"


@dataclass(frozen=True)
class DetectorRows:
    """Rows of a detector by the names of the pictures that they are of: a folder with an .npz for each, or .tsv files
    as bottom-up attention's and LXMERT's, one or a folder of them. An .npz has `features` [N, F], `boxes` [N, 4] or, as
    UNITER's, `norm_bb`; where boxes are in pixels `img_w` and `img_h`; and may have `objects_id`, `objects_conf`,
    `attrs_id`, `attrs_conf`.

    Args:
        path: of the folder or the file.
        most: regions of a picture that are read, the first ones; None = all.
    """

    path: Path
    most: int | None = None
    places: Mapping[str, tuple[str, int]] = field(default_factory=dict, repr=False)  # file and offset, by name

    @classmethod
    def open(cls, path: Path, most: int | None = None) -> "DetectorRows":
        """Lists what is there; a ValueError of nothing that could be read."""
        op = "DetectorRows"
        require(op, most is None or most >= 1, "most must be at least 1, got {}", most)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        places = {x.stem: (str(x), 0) for x in files if x.suffix == ".npz"}
        for file in files:
            if file.suffix == ".tsv" and file.is_file():
                with file.open("rb") as opened:
                    offset = 0
                    for line in opened:
                        places.setdefault(line.split(b"\t", 1)[0].decode(), (str(file), offset))
                        offset += len(line)
        require(op, bool(places), "path must be a folder with .npz files, or .tsv files, got {}", path)
        return cls(path, most, places)

    @cached_property
    def width(self) -> int:
        """F, of a region's features, as the first picture has it."""
        return self.of(next(iter(self.places))).features.shape[-1]

    @cached_property
    def has_objects(self) -> bool:
        """Whether the first picture's regions are said to be something."""
        return self.of(next(iter(self.places))).objects is not None

    def __call__(self, images: Sequence[Image.Image]) -> Regions:
        """The rows of pictures that were read from files, to measure on; a ValueError where one has none. What has no
        file, such as a blank picture in the place of a missing one, has one region of zeros."""
        found = []
        for image in images:
            try:
                found.append(self.of_picture(image) if FILE in image.info else self._nothing)
            except BrokenRecord as error:
                what = f"regions must hold rows of every picture, got {error.reason} for {image.info[FILE]}"
                raise ValueError(f"DetectorRows: {what} in {self.path}") from None
        return Regions.joined(found)

    @cached_property
    def _nothing(self) -> Regions:
        objects = None
        if self.has_objects:
            kinds = (torch.int64, torch.float32) * 2
            objects = Objects(*(torch.zeros(1, 1, dtype=kind) for kind in kinds))
        return Regions(torch.zeros(1, 1, self.width), torch.zeros(1, 1, 4), torch.ones(1, dtype=torch.int64), objects)

    def of_picture(self, image: Image.Image) -> Regions:
        """Those of a picture that was read from a file, by its name without folder and ending; raises BrokenRecord."""
        name = image.info.get(FILE)
        BrokenRecord.unless(name is not None, "a picture without a file's name has no rows of a detector")
        return self.of(Path(str(name)).stem)

    def of(self, name: str) -> Regions:
        """Those of one picture; raises BrokenRecord."""
        BrokenRecord.unless(name in self.places, "no rows of a detector")
        file, offset = self.places[name]
        try:
            raw = dict(np.load(file)) if file.endswith(".npz") else _row(file, offset)
            return _digested(raw, self.most)
        except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
            raise BrokenRecord(f"damaged rows of a detector: {type(error).__name__}") from None

    @property
    def summary(self) -> str:
        """For the reader."""
        return f"rows of a detector of {len(self.places)} pictures in {self.path}, {self.width} features each"


def _row(file: str, offset: int) -> dict[str, Any]:
    with Path(file).open("rb") as opened:
        opened.seek(offset)
        line = opened.readline().decode()
    csv.field_size_limit(2**31 - 1)
    raw: dict[str, Any] = next(csv.DictReader(io.StringIO(line), TSV_FIELDS, delimiter="\t"))
    for name in ("boxes", "features", "objects_conf", "attrs_conf", "objects_id", "attrs_id"):
        dtype = np.int64 if name.endswith("_id") else np.float32
        raw[name] = np.frombuffer(base64.b64decode(raw[name]), dtype)
    num = int(raw["num_boxes"])
    return raw | {"boxes": raw["boxes"].reshape(num, 4), "features": raw["features"].reshape(num, -1)}


def _digested(raw: Mapping[str, Any], most: int | None) -> Regions:
    features = np.asarray(raw["features"], np.float32)[:most]
    if "norm_bb" in raw:
        boxes = np.asarray(raw["norm_bb"], np.float32)[:most, :4]
    else:
        boxes = np.asarray(raw["boxes"], np.float32)[:most]
        if "img_w" in raw:
            width, height = (float(np.asarray(raw[name])) for name in ("img_w", "img_h"))
            boxes = boxes / np.array([width, height, width, height], np.float32)
    is_whole = features.ndim == 2 and boxes.shape == (len(features), 4) and len(features) > 0
    if not is_whole or not (np.isfinite(features).all() and np.isfinite(boxes).all()):
        raise ValueError
    objects = None
    if all(name in raw for name in _OF_OBJECTS):
        kinds = (np.int64, np.float32) * 2
        parts = [np.asarray(raw[name]).astype(kind)[:most] for name, kind in zip(_OF_OBJECTS, kinds, strict=True)]
        objects = Objects(*(torch.tensor(x)[None] for x in parts))
    x, y = (torch.tensor(part)[None] for part in (features, boxes))
    return Regions(x, y, torch.tensor([len(features)]), objects)


def drawn_regions(count: int, rate: float, rng: np.random.Generator, *, at_least_one: bool = False) -> np.ndarray:
    """Which of `count` regions are hidden, bool [N], each with probability `rate`."""
    require("drawn_regions", 0 <= rate <= 1, "rate must be in [0, 1], got {}", rate)
    drawn = rng.random(count)
    is_hidden = drawn < rate
    if at_least_one and count and not is_hidden.any():
        is_hidden = drawn == drawn.min()
    return is_hidden


def mask_regions(
    regions: Regions, rate: float, rngs: Sequence[np.random.Generator], *, replace: tuple[float, float] = (0.8, 0.1)
) -> tuple[Tensor, Tensor]:
    """Features with some hidden, [B, N, F], and which, bool [B, N]: of the hidden a share becomes zero and another the
    features of a region of any image of the batch, the rest stays as it is (LXMERT, arXiv:1908.07490)."""
    counts, features = regions.counts.tolist(), regions.features.clone()
    size, length = features.shape[:2]
    is_hidden = torch.zeros(size, length, dtype=torch.bool)
    for row, (count, rng) in enumerate(zip(counts, rngs, strict=True)):
        hidden = np.flatnonzero(drawn_regions(count, rate, rng))
        is_hidden[row, hidden] = True
        for place, kind in zip(hidden, rng.random(len(hidden)), strict=True):
            if kind < replace[0]:
                features[row, place] = 0
            elif kind < sum(replace):
                other = int(rng.integers(size))
                features[row, place] = regions.features[other, int(rng.integers(counts[other]))]
    return features, is_hidden
