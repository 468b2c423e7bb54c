"""`mmcore capfilt`: captions written for pictures, and captions that do not match them left out (BLIP, arXiv
2201.12086)."""

import csv
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image

from mmcore.checkpoint import write_file, write_json
from mmcore.data import DataConfig, open_data
from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.opening import source_kind
from mmcore.data.sources import tar
from mmcore.data.sources.base import PairSource
from mmcore.data.sources.files import FilePairs
from mmcore.data.sources.shards import ShardSource, Streamed
from mmcore.runs import find_run, read_run
from mmcore.systems import recipe_entry
from mmcore.tasks import default_device

Source = Literal["web", "synthetic"]
SETTINGS = "capfilt.json"


@dataclass(frozen=True)
class CapFiltConfig:
    """Write a caption for each picture of --data, and keep of both captions those that match it, in files that --data
    reads."""

    out: Path
    """Folder of the files: one a shard of tars, else one for each --shard-size records, and pairs.json or pairs.csv of
    all of them. Shards that are there are not made again; ranks of torchrun share them."""
    captioner: Path
    """A run that writes captions by numbers of their own, such as of blip-caption."""
    filter: Path
    """A run that matches pairs, such as of blip-retrieval."""
    data: DataConfig = field(default_factory=DataConfig)
    least: float = 0.5
    """Probability of matching from which a caption is kept, as published."""
    top_p: float = 0.9
    """Probability of the nucleus that captions are drawn from, as published."""
    seed: int = 0
    """Of what is drawn: a picture's caption depends on this and its image id alone, whatever stands beside it."""
    shard_size: int = 10_000
    """Records of a file, of data that is not in shards."""
    batch_size: int = 64
    """Records that the models read at a time."""

    def __post_init__(self) -> None:
        for name in ("least", "top_p"):
            value = getattr(self, name)
            is_share = 0 <= value <= 1 if name == "least" else 0 < value <= 1
            if not is_share:
                raise ValueError(f"--{name.replace('_', '-')} must be a share, got {value}")
        for name, least in (("shard_size", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")


class Kept(NamedTuple):
    """A caption that matches its picture."""

    caption: str
    source: Source
    score: float


class Told(NamedTuple):
    """What is made of a record."""

    record: int  # its position in the shard
    image_id: int
    kept: list[Kept]


@dataclass(frozen=True)
class Judges:
    """Both models, as functions of pictures.

    Args:
        caption: pictures and their image ids to captions.
        match: pictures, for each caption its picture, and captions to probabilities.
    """

    caption: Callable[[Sequence[Image.Image], Sequence[int]], list[str]]
    match: Callable[[Sequence[Image.Image], Sequence[int], list[str]], list[float]]


def judges_of(config: CapFiltConfig) -> Judges:
    """Reads both runs; a ValueError of one that has not what is asked of it."""
    for flag, capability, what in (
        ("captioner", "samples", "writes captions by numbers of their own"),
        ("filter", "matches", "matches pairs"),
    ):
        path = getattr(config, flag)
        name = find_run(path).recipe
        if not hasattr(recipe_entry(name).load(), capability):
            raise ValueError(f"--{flag} must be a run of a model that {what}, got one of {name}, {path}")
    device, models = default_device(), [read_run(x) for x in (config.captioner, config.filter)]
    parts: list[Any] = [(x.recipe, x.assets, x.model.to(device)) for x in models]
    (writer, *of_writer), (judge, *of_judge) = parts
    caption = writer.samples(*of_writer, device, config.top_p, config.seed)
    embeds, matches = judge.embeds(*of_judge, device), judge.matches(*of_judge, device)

    @torch.no_grad()
    def match(images: Sequence[Image.Image], owner: Sequence[int], captions: list[str]) -> list[float]:
        states = embeds.states(embeds.preprocess(images).to(device))
        return matches(states, torch.tensor(owner, device=device), captions).double().sigmoid().tolist()

    return Judges(torch.no_grad()(caption), match)


def judged(source: PairSource, records: range, judges: Judges, config: CapFiltConfig, tally: Any) -> list[Told]:
    """Of each record of a shard the captions that match, the record's own and the one that is written; of several
    records of a picture the first has the latter. The batches of a shard are always the same."""
    found, seen = [], set[int]()
    for first in range(0, len(records), config.batch_size):
        part = records[first : first + config.batch_size]
        images, good, broken = [], [], []
        for i in part:
            try:
                images.append(source.raw_image(i))
                good.append((i, source.image_id(i)))
            except BrokenRecord as error:
                broken.append((source.sample_id(i), error.reason))
        tally.add(len(part), broken)
        tally.check(final=False)
        if not images:
            continue
        written = judges.caption(images, [name for _, name in good])
        rows: list[tuple[int, str, Source]] = []
        for row, ((i, name), text) in enumerate(zip(good, written, strict=True)):
            own = source.caption(i, np.random.default_rng([config.seed, name]))
            rows.append((row, own, "web"))
            if name not in seen and text.strip() and text != own:
                rows.append((row, text, "synthetic"))
            seen.add(name)
        scores = judges.match(images, [row for row, *_ in rows], [text for _, text, _ in rows])
        told = [Told(i, name, []) for i, name in good]
        for (row, text, kind), score in zip(rows, scores, strict=True):
            if score >= config.least:
                told[row].kept.append(Kept(text, kind, round(score, 6)))
        found += told
    return found


def main(arguments: list[str]) -> None:
    """Runs `--captioner RUN --filter RUN --data DATA --out FOLDER`; a ValueError of what a user can get wrong, before
    anything is written."""
    options: Any = {"config": (tyro.conf.OmitArgPrefixes,)}
    config = tyro.cli(CapFiltConfig, args=arguments, prog="mmcore capfilt", **options)
    for line in capfilt(config):
        print(line, flush=True)


def capfilt(config: CapFiltConfig) -> Iterator[str]:
    """Makes the files that are not there yet; a line for each."""
    kind = source_kind(config.data.data)
    is_split = kind not in ("shards", "emoji") and config.data.val_data is None
    data = open_data(replace(config.data, val_fraction=0.0) if is_split else config.data, seed=0)
    if data.source is None:
        raise ValueError(f"--data must hold captions, got {config.data.data!r}, which has questions alone")
    judges, source = judges_of(config), data.source
    _settle(config)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tally = BrokenTally(config.data.max_broken, f"data={config.data.data!r}")
    is_table = kind == "csv"
    suffix = "tar" if isinstance(source, ShardSource) else "csv" if is_table else "json"
    num = len(source.shards) if isinstance(source, ShardSource) else -(-len(source) // config.shard_size)
    files = [config.out / f"{shard:05d}.{suffix}" for shard in range(num)]
    for shard in range(rank, num, ranks):
        if files[shard].is_file():
            yield f"{files[shard]}: there already"
            continue
        if isinstance(source, ShardSource):
            samples = list(tar.shard_samples(iter([source.shards[shard]])))
            streamed = Streamed(samples, source.keys)
            told = judged(streamed, range(len(samples)), judges, config, tally)
            _write_tar(files[shard], streamed, told)
        else:
            first = shard * config.shard_size
            told = judged(source, range(first, min(first + config.shard_size, len(source))), judges, config, tally)
            _write_rows(files[shard], _rows(config.out, source, told), config.data)
        counts = Counter(kept.source for x in told for kept in x.kept)
        kept = f"{counts['web']} own and {counts['synthetic']} written captions"
        yield f"{files[shard]}: of {len(told)} records {kept} kept"
    tally.check(final=True)
    if suffix != "tar" and all(file.is_file() for file in files):
        whole = config.out / f"pairs.{suffix}"
        rows = {(x["image_id"], x["caption"]): x for file in files for x in _read_rows(file, config.data)}
        if not rows:
            raise ValueError(
                f"--filter must match some captions with --least {config.least}, got none: {config.filter}"
            )
        _write_rows(whole, list(rows.values()), config.data)
        yield f"{whole}: {len(rows)} pairs"


def _settle(config: CapFiltConfig) -> None:
    """A folder is of one setting, so that its shards belong together."""
    names = ("captioner", "filter", "least", "top_p", "seed", "shard_size")
    now = {name: str(getattr(config, name)) for name in names} | {"data": config.data.data}
    file = config.out / SETTINGS
    if file.is_file():
        before = json.loads(file.read_text())
        for name, value in now.items():
            if before.get(name) != value:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be {before.get(name)} as what is in {config.out}, got {value}")
        return
    if config.out.exists() and any(config.out.iterdir()):
        raise ValueError(f"--out must be a new folder, or one of an earlier call, got {config.out}")
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(file, now)


def _rows(out: Path, source: PairSource, told: list[Told]) -> list[dict[str, Any]]:
    """As LAVIS's JSON has captions; pictures that are no files are written beside."""
    rows = []
    for x in told:
        if not x.kept:
            continue
        if isinstance(source, FilePairs):
            image, name = os.path.abspath(source.paths[x.record]), source.identities[x.record]
        else:
            image, name = f"images/{x.image_id}.png", str(x.image_id)
            buffer = io.BytesIO()
            source.raw_image(x.record).save(buffer, format="PNG")
            (out / "images").mkdir(exist_ok=True)
            write_file(out / image, buffer.getvalue())
        rows += [{"image": image, "image_id": name, **kept._asdict()} for kept in x.kept]
    return rows


def _columns(data: DataConfig) -> dict[str, str]:
    """Of a table, what its columns are called."""
    return {"image": data.csv_img_key, "caption": data.csv_caption_key}


def _separator(data: DataConfig) -> str:
    return "\t" if data.csv_separator == "\\t" else data.csv_separator


def _write_rows(file: Path, rows: list[dict[str, Any]], data: DataConfig) -> None:
    if file.suffix == ".json":
        write_file(file, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())
        return
    names, text = _columns(data), io.StringIO()
    columns = [names.get(x, x) for x in ("image", "caption", "image_id", "source", "score")]
    writer = csv.DictWriter(text, columns, delimiter=_separator(data), lineterminator="\n")
    writer.writeheader()
    writer.writerows({names.get(name, name): x for name, x in row.items()} for row in rows)
    write_file(file, text.getvalue().encode())


def _read_rows(file: Path, data: DataConfig) -> list[dict[str, Any]]:
    if file.suffix == ".json":
        return json.loads(file.read_text())
    ours = {theirs: name for name, theirs in _columns(data).items()}
    with file.open(newline="", encoding="utf-8") as opened:
        return [
            {ours.get(n, n): x for n, x in row.items()} for row in csv.DictReader(opened, delimiter=_separator(data))
        ]


def _write_tar(file: Path, source: Streamed, told: list[Told]) -> None:
    """A sample for each caption, with the picture's own bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for x in told:
            sample = source.samples[x.record]
            suffix = next(s for s in tar.IMAGE_SUFFIXES if s in sample)
            for kept in x.kept:
                about = {"image_id": tar.image_identity(sample), **kept._asdict()}
                parts = {suffix: sample[suffix], "txt": kept.caption.encode(), "json": json.dumps(about).encode()}
                for kind, content in parts.items():
                    member = tarfile.TarInfo(f"{sample['__key__']}-{kept.source}.{kind}")
                    member.size = len(content)
                    opened.addfile(member, io.BytesIO(content))
    write_file(file, buffer.getvalue())
