"""Whether sentences about two images are true, as NLVR2 asks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmcore import checkpoint
from mmcore.data.sources.statements import StatementData, open_held_out_statements
from mmcore.tasks.subject import Subject, nothing

__all__ = ["Options", "follow", "report"]

BATCH_SIZE = 64
MAX_FOLLOWED = 1024
"""Statements that a run is measured on while it trains."""
FIGURE = "reasoning accuracy"

Judges = Callable[[Sequence[Sequence[Image.Image]], Sequence[str]], Tensor]
"""The left images and the right images of B sentences, and these, to scores [B], above 0 where one is true."""


@dataclass(frozen=True)
class Options:
    """Measure on what the run held out, or on other data."""

    data: str | None = None
    """NLVR2's JSON, an object a line, or LAVIS's list, all of it; None = what the run held out."""
    image_root: str | None = None
    """Folder of the images of --data, or of NLVR2's folders with them; None = that of the file."""

    def __post_init__(self) -> None:
        if self.image_root is not None and self.data is None:
            raise ValueError(f"--image-root has no effect without --data, got {self.image_root!r}")

    def held_out(self) -> StatementData | None:
        """What is measured on in place of what the run held out."""
        return None if self.data is None else open_held_out_statements(self.data, self.image_root)


@torch.no_grad()
def judged(subject: Subject, most: int | None = None) -> list[tuple[int, bool]]:
    """The positions of the first `most` held-out statements that can be read, and whether each is taken as true."""
    val = subject.data.val
    total = len(val) if most is None else min(most, len(val))
    judges = subject.recipe.judges(subject.assets, subject.model, subject.device)

    def told(part: range) -> tuple[list[tuple[int, bool]], list[tuple[str, str]]]:
        images, good, broken = val.read(part)
        blank = [[Image.new("RGB", (32, 32))]] * 2
        texts = [val.statements[i].text for i in good] or ["nothing"]
        scores = judges(images if good else blank, texts).float().cpu().tolist()
        return [(i, score > 0) for i, score in zip(good, scores, strict=False)], broken

    found = subject.ranks.shared(total, BATCH_SIZE, told)
    val.check_broken(total, [x for _, broken in found for x in broken])
    return [x for part, _ in found for x in part]


def _share(subject: Subject, found: list[tuple[int, bool]]) -> float:
    statements = subject.data.val.statements
    return sum(statements[i].is_true == taken for i, taken in found) / max(1, len(found))


def follow(subject: Subject) -> dict[str, float]:
    """The accuracy on some statements while a run trains; nothing where none is held out."""
    if subject.data.val is None:
        return {}
    return {FIGURE: _share(subject, judged(subject, MAX_FOLLOWED))}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints the accuracy; writes what is said of each statement into the run's folder."""
    val = getattr(subject.data, "val", None)
    if val is None:
        return nothing(options, f"{subject.data.name} has no held-out statements")
    found = judged(subject)
    majority = sum(x.is_true for x in val.statements) / len(val)
    print(
        f"reasoning accuracy (held-out), {len(found)} statements: {100 * _share(subject, found):.1f} % "
        f"(majority {100 * max(majority, 1 - majority):.1f} %)"
    )
    file = subject.folder / "statements.json"
    rows = [{"identifier": val.statements[i].identifier, "label": str(taken)} for i, taken in found]
    checkpoint.write_json(file, rows)
    return [file]
