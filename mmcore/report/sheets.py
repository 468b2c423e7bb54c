"""Sheets of pictures with what is said of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from mmcore.ops import require
from mmcore.report.drawing import DPI, FAINT, FONT_NOTE, INK, MIDDLE, WRONG, colour_of, draw_image, mark, save
from mmcore.report.fonts import escape_undrawable, families_for, wrap

# Pictures in a row of a sheet of captions, the inches of each, and those between two.
_COLUMNS, _CELL, _GAP = 6, 1.9, 0.32


def plot_captions(
    images: Sequence[Any],
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    path: str | Path,
    *,
    title: str,
    questions: Sequence[str] | None = None,
    right: Sequence[bool] | None = None,
) -> None:
    """Draw images with what a model says of each and, fainter, what a person says, as one PNG whose folder is made.

    Args:
        images: [N]; each a PIL image or uint8 [H, W] or [H, W, 3].
        captions: [N] the model's captions or answers, in any script, as `plot_retrieval`'s queries.
        references: [N] what people say of each image, of which the first is shown.
        questions: [N], shown above the answers; None = there are none.
        right: [N], frames images green or red; None = no frames.

    Raises:
        ValueError: no images, lengths that differ, an image without a reference.
    """
    given = {"captions": captions, "references": references, "questions": questions, "right": right}
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    op, size = "plot_captions", len(images)
    fits = size > 0 and all(n == size for n in lengths.values())
    require(op, fits, "all must be as many as images, not 0, got {} and {}", size, lengths)
    lines: list[list[_Line]] = []
    for i, people in enumerate(references):
        listed = not isinstance(people, str) and len(people) > 0
        require(op, listed, "each of references must be a list of texts, got {!r} at {}", people, i)
        sign, frame = ("", INK) if right is None else (mark(right[i]) + " ", colour_of(right[i]))
        asked = [] if questions is None else [_Line(questions[i], 8.5, MIDDLE)]
        lines.append([*asked, _Line(sign + (captions[i] or "—"), 9.5, frame), _Line(people[0], 8.5, FAINT)])
    frames = [None if right is None else colour_of(right[i]) for i in range(len(images))]
    _draw(images, frames, lines, path, title)


class Exchange(NamedTuple):
    """A question of a dialogue, what a model says, and what the data says."""

    question: str
    said: str
    wanted: str
    is_right: bool


def plot_dialogues(
    images: Sequence[Any], dialogues: Sequence[Sequence[Exchange]], path: str | Path, *, title: str
) -> None:
    """Draw images with dialogues about them as one PNG: questions, answers in green or red, and what is right, fainter,
    under a wrong one.

    Args:
        images: [N]; each a PIL image or uint8 [H, W] or [H, W, 3].
        dialogues: [N], of one exchange or more each, in any script.

    Raises:
        ValueError: no images, lengths that differ, a dialogue without an exchange.
    """
    sizes = [len(dialogue) for dialogue in dialogues]
    fits = len(images) > 0 and len(sizes) == len(images) and all(sizes)
    sentence = "dialogues must be of one exchange or more for each of the images, not 0, got {} for {}"
    require("plot_dialogues", fits, sentence, sizes, len(images))
    lines: list[list[_Line]] = []
    for dialogue in dialogues:
        found: list[_Line] = []
        for question, said, wanted, is_right in dialogue:
            found += [_Line(question, 8.5, MIDDLE)] if question else []
            found.append(_Line(f"{mark(is_right)} {said or '—'}", 9.5, colour_of(is_right)))
            found += [] if is_right else [_Line(wanted, 8.5, FAINT)]
        lines.append(found)
    _draw(images, [None] * len(images), lines, path, title)


class _Line(NamedTuple):
    """A paragraph below an image."""

    text: str
    size: float
    colour: str


def _draw(
    images: Sequence[Any], frames: Sequence[str | None], lines: Sequence[Sequence[_Line]], path: str | Path, title: str
) -> None:
    families = families_for([line.text for of_one in lines for line in of_one])
    figure = Figure(facecolor="white", dpi=DPI)
    FigureCanvasAgg(figure)  # measures texts
    cells, undrawable = [], False
    for image, frame, of_one in zip(images, frames, lines, strict=True):
        texts = []
        for line in of_one:
            shown, lost = escape_undrawable(line.text, families)
            undrawable |= lost
            texts.append(_paragraph(figure, shown, line.size, line.colour, families))
        cells.append(_Cell(image, frame, texts))
    height = _lay_out(figure, cells)
    figure.text(0, 1 + 0.2 / height, title, fontsize=12, color=INK, fontweight="bold", parse_math=False)
    if undrawable:
        figure.text(0, -0.15 / height, FONT_NOTE, fontsize=8.5, color=WRONG, va="top")
    save(figure, path)


class _Cell(NamedTuple):
    """An image, its frame, and the texts below it."""

    image: Any
    frame: str | None
    texts: list[Text]


def _paragraph(figure: Figure, text: str, size: float, colour: str, families: list[str]) -> Text:
    """`text` in lines as wide as a cell, to be placed by its top left corner."""
    shown = wrap(text, int(72 * _CELL / (0.55 * size)), 10)
    drawn = figure.text(0, 0, shown, fontsize=size, color=colour, family=families, va="top", parse_math=False)
    # capitals are wider than a column
    drawn.set_fontsize(size * min(1, _CELL / _extent(drawn)[0]))
    return drawn


def _extent(text: Text) -> np.ndarray:
    """Width and height in inches."""
    assert text.figure is not None
    return np.array(text.get_window_extent().size) / text.figure.dpi


def _lay_out(figure: Figure, cells: Sequence[_Cell]) -> float:
    """Places images and texts in rows as high as what they hold; the height of all, in inches."""
    rows = [cells[i : i + _COLUMNS] for i in range(0, len(cells), _COLUMNS)]
    sizes = [[np.asarray(cell.image).shape for cell in row] for row in rows]
    above = [_CELL * min(1, max(h / w for h, w, *_ in row)) for row in sizes]
    below = [max(sum(_extent(text)[1] + 0.07 for text in cell.texts) for cell in row) for row in rows]
    height, width = sum(above) + sum(below) + _GAP * (len(rows) - 1), len(rows[0]) * (_CELL + _GAP) - _GAP
    figure.set_size_inches(width, height)
    y = height
    for row, image_height, text_height in zip(rows, above, below):
        y -= image_height
        for i, cell in enumerate(row):
            x, line = i * (_CELL + _GAP), y
            box = (x / width, y / height, _CELL / width, image_height / height)
            draw_image(figure.add_axes(box, anchor="SW"), cell.image, cell.frame)
            for text in cell.texts:
                text.set_position((x / width, (line - 0.07) / height))
                line -= _extent(text)[1] + 0.07
        y -= text_height + _GAP
    return height
