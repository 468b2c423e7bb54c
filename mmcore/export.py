"""`mmcore export RUN`: a run's weights as a folder of another library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mmcore.runs import WEIGHTS, WeightsKey, find_run, read_run
from mmcore.systems import recipe_entry

_PICTURES = """{} drops transparency, where training saw white,
clips 16 bits, where training saw the upper 8, and does not turn a picture by its EXIF orientation: of such a file give
it mmcore.data.decode_rgb(file.read_bytes())"""
_PROCESSORS = {
    "hf": "Its image processor gives the pixels that training saw, but",
    "open_clip": "open_clip's transform gives the pixels that training saw, a cropped square perhaps one aside, but",
}


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's weights as a folder that transformers or open_clip loads."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its newest checkpoint is used), or one checkpoint of it."""
    out: Path
    """Folder to write, which must not exist."""
    format: str | None = None
    """hf: as transformers' from_pretrained reads them; open_clip: a CLIP under its names; None = the recipe's first."""
    llm: Path | None = None
    """Where the language model of the run is now; None = where it was."""
    weights: WeightsKey = "auto"
    """ema = the averaged weights, weight = the trained ones, auto = ema where the run kept one."""


def main(arguments: list[str]) -> None:
    """Runs `RUN --out FOLDER ...`; a ValueError of a recipe without export, or a format that it has not."""
    config = tyro.cli(ExportConfig, args=arguments, prog="mmcore export")
    name = find_run(config.run).recipe
    formats = recipe_entry(name).load().formats
    if not formats:
        raise ValueError(f"RUN must be of a recipe that exports, got {config.run}, which is of {name}")
    chosen = formats[0] if config.format is None else config.format
    if chosen not in formats:
        raise ValueError(f"--format must be {' or '.join(formats)} for a run of {name}, got {chosen}")
    trained = read_run(config.run, config.weights, llm=config.llm, purpose="export")
    trained.recipe.export(trained.assets, trained.model, config.out, chosen)  # pyright: ignore[reportAttributeAccessIssue]
    print(f"{WEIGHTS[trained.run.key]} of step {trained.run.step} written to {config.out} ({chosen})")
    if chosen in _PROCESSORS:
        print(_PICTURES.format(_PROCESSORS[chosen]))
