"""`mmcore prove`: trains a system's tiny recipe from nothing on built-in data, beside a control that cannot know."""

import importlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image

from mmcore.data import PairData
from mmcore.data.opening import ChatData
from mmcore.data.sources.statements import StatementData
from mmcore.errors import complain, did_you_mean
from mmcore.figures import is_share, shown
from mmcore.launch import leave, parse
from mmcore.proof import Controls, Figures
from mmcore.recipe import Proof
from mmcore.runs import read_run
from mmcore.systems import entries
from mmcore.tasks import follow, subject_of, task

NO_DATA = 3
"""Exit code of a proof whose data cannot be had here."""


@dataclass(frozen=True)
class ProveConfig:
    """Train the tiny recipe of a system from nothing and compare it with a control that cannot know; exit 1 below its
    floor, 3 where its data cannot be had."""

    name: Annotated[str, tyro.conf.Positional]
    """A proof, a system for all of its own, or all."""
    out: Path | None = None
    """Folder of the runs and of sheets of held-out records, which must be new; None = one that is removed."""
    json: Path | None = None
    """File for the figures."""


@dataclass(frozen=True)
class Found:
    """A figure, its control and its floor: of [0, 1], or an R^2."""

    proof: str
    figure: str
    value: float
    control: float | None
    floor: float
    ceiling: float

    @property
    def holds(self) -> bool:
        """Whether it reaches its floor, and its control stays below its ceiling."""
        return self.value >= self.floor and (self.control is None or self.control < self.ceiling)

    @property
    def line(self) -> str:
        value, control = ("none" if x is None else shown(self.figure, x) for x in (self.value, self.control))
        return f"{self.proof}: {self.figure} {value}; control {control}; floor {shown(self.figure, self.floor, 0)}"

    @property
    def json(self) -> dict[str, Any]:
        """For --json: shares of [0, 1], not per cent, and an R^2 as it is."""
        unit = "share" if is_share(self.figure) else "R^2"
        return {**vars(self), "unit": unit, "holds": self.holds}


def main(arguments: list[str]) -> None:
    """Runs `NAME|all|--list ...`; raises ValueError for an unknown proof, or a folder that exists."""
    known = entries("PROOFS")
    if arguments[:1] == ["--list"]:
        for name, entry in known.items():
            claims = "; ".join(f"{c.figure}, floor {shown(c.figure, c.floor, 0)}" for c in entry.load().claims)
            print(f"{name:14} {claims}")
        return
    config = tyro.cli(ProveConfig, args=arguments, prog="mmcore prove")
    system = [name for name, entry in known.items() if entry.package.rpartition(".")[2] == config.name]
    names = [config.name] if config.name in known else list(known) if config.name == "all" else system
    hint = did_you_mean(config.name, [*known, "all"])
    if not names:
        raise ValueError(f"the proof must be one of {', '.join(known)} or all, got {config.name!r}{hint}")
    found: list[Found] = []
    code = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if config.out is None else config.out
        for name in names:
            try:
                found += prove(name, known[name].load(), root / name, draws=config.out is not None)
            except FileNotFoundError as error:
                code = complain(error, NO_DATA)
    if config.json is not None and not (dist.is_initialized() and dist.get_rank()):
        config.json.write_text(json.dumps([x.json for x in found], indent=2) + "\n")
    leave(code if all(x.holds for x in found) else 1)


def prove(name: str, proof: Proof, root: Path, *, draws: bool = False) -> list[Found]:
    """Trains, measures and prints a line a figure and, where it `draws`, the sheets of held-out records; every rank
    alike, of which the first measures."""
    if proof.measured is not None:
        values, controls = proof.measured(root, _trained)
        is_other = dist.is_initialized() and dist.get_rank() > 0
        return [] if is_other else _compared(name, proof, values, controls)
    last = _trained(proof.runs, root)
    without = _trained(proof.without, root / "without") if proof.without else None
    if dist.get_rank():
        return []
    subject = subject_of(read_run(last))
    values, controls = follow(subject), {}
    if any(c.control == "others" for c in proof.claims):
        controls["others"] = follow(replace(subject, data=with_other_images(subject.data), own=subject.data))
    if any(c.control == "untrained" for c in proof.claims):
        torch.manual_seed(subject.recipe.run.seed)
        fresh = subject.recipe.in_use(subject.recipe.build(subject.assets)).to(subject.device)
        controls["untrained"] = follow(replace(subject, model=fresh))
    if without is not None:
        controls["without"] = follow(subject_of(read_run(without)))
    found = _compared(name, proof, values, controls)
    if draws:
        with redirect_stdout(StringIO()):
            files = [file for name in subject.recipe.tasks for file in task(name).report(subject, None)]
        print("  pictures:", ", ".join(str(file) for file in files if file.suffix == ".png"))
    sys.stdout.flush()
    return found


def _compared(name: str, proof: Proof, values: Figures, controls: Controls) -> list[Found]:
    """Prints a line a claim."""
    found = []
    for c in proof.claims:
        ceiling = c.floor if c.ceiling is None else c.ceiling
        control = None if c.control is None else controls[c.control][c.value]
        found.append(Found(name, c.figure, values[c.value], control, c.floor, ceiling))
    for figure in found:
        print(figure.line)
    sys.stdout.flush()
    return found


def _trained(runs: Sequence[tuple[str, str]], root: Path) -> Path:
    """The folder of the last of them."""
    train, folders = importlib.import_module("mmcore.train.trainer").train, []
    for i, (recipe, flags) in enumerate(runs):
        words = [*flags.format(*folders).split(), "--out", str(root / f"{i}-{recipe}")]
        folders.append(train(recipe, parse(recipe, words, f"mmcore train {recipe}"), is_quiet=True))
    return folders[-1]


@dataclass(frozen=True)
class _Others:
    """A source whose samples show the images of other samples."""

    source: Any
    place: Mapping[int, int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        return self.source.raw_image(self.place[i], least)


@dataclass(frozen=True)
class _OtherPictures:
    """Pictures under each other's names."""

    pictures: Any
    name_of: Mapping[str, str]

    def named_image(self, name: str, least: int | None = None) -> Image.Image:
        return self.pictures.named_image(self.name_of[name], least)


def with_other_images(data: Any) -> Any:
    """The same held-out captions, questions and conversations about images of other records; a task that compares with
    the record's own image has it from `Subject.own`."""
    if isinstance(data, ChatData):
        assert data.val is not None
        names = sorted({name for c in data.val.conversations for name in c.images})
        other = dict(zip(names, [names[i] for i in _shuffled(len(names))], strict=True))
        return replace(data, val=replace(data.val, pictures=_OtherPictures(data.val.pictures, other)))
    if isinstance(data, StatementData):
        return data.with_other_images()
    assert isinstance(data, PairData)
    val, questions = data.val, data.val_questions
    if val is not None:
        indices = list(val.indices)
        place = dict(zip(indices, [indices[i] for i in _shuffled(len(indices))], strict=True))
        val = replace(val, source=_Others(val.source, place))
    if questions is not None:
        place = dict(enumerate(_shuffled(len(questions))))
        questions = replace(questions, source=_Others(questions.source, place))
    return replace(data, val=val, val_questions=questions)


def _shuffled(count: int) -> list[int]:
    return np.random.default_rng(0).permutation(count).tolist()
