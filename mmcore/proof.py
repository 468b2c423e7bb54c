"""What a recipe says of how it is proved: runs, and figures with floors and controls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Figures = Mapping[str, float]
Controls = Mapping[str, Figures]


@dataclass(frozen=True)
class Claim:
    """A figure that a proof shows.

    Args:
        figure: for the reader, such as "zero-shot accuracy (held-out)".
        value: its name among those that the recipe's tasks follow, such as "zero-shot top-1".
        floor: that it has to reach, at most 1.
        ceiling: that the control has to stay below; None = the floor.
        control: "others", the same model shown the images of other records; "without", the last of `Proof.without`;
            "untrained", the model as it was before the first step; None of a figure that all of these would reach too.
    """

    figure: str
    value: str
    floor: float
    ceiling: float | None = None
    control: Literal["others", "without", "untrained"] | None = "others"


@dataclass(frozen=True)
class Proof:
    """How a recipe is proved.

    Args:
        runs: name and flags of each run, the last of which is measured; "{0}" in a flag is the folder of the first.
        claims: what it shows, beside a control.
        without: as `runs`, what is trained without the method, or without what it needs.
        measured: of a proof that is more than runs: a folder and what trains `runs` in one to figures by their names,
            and those of controls.
    """

    runs: Sequence[tuple[str, str]]
    claims: Sequence[Claim]
    without: Sequence[tuple[str, str]] = ()
    measured: Callable[[Path, Callable[[Sequence[tuple[str, str]], Path], Path]], tuple[Figures, Controls]] | None = (
        None
    )
