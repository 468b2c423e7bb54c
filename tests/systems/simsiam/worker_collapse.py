"""Trains SimSiam with what keeps it from collapsing left out: the stop-gradient, and the projector's last BatchNorm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmcore.launch import parse
from mmcore.parts.heads import projection_head
from mmcore.systems.simsiam.model import SimSiamModel
from mmcore.systems.simsiam.recipe import SimSiam
from mmcore.train.trainer import train
from tests.distributed.launch import serve


def plain_head(self: SimSiamModel, sizes: Sequence[int]) -> nn.Sequential:
    return projection_head(sizes, bias=False)


def work(folder: Path, flags: str) -> dict[str, Any]:
    SimSiamModel.head = plain_head
    SimSiam.tasks = ("projection",)
    try:
        train("simsiam", parse("simsiam", [*flags.split(), "--out", str(folder / "run")], "simsiam"), is_quiet=True)
    except FloatingPointError as error:
        return {"said": str(error)}
    return {"said": ""}


if __name__ == "__main__":
    serve(work)
