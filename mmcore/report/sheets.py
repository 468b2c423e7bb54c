"""Sheets of pictures with what is said of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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
    """
    given = {"captions": captions, "references": references, "questions": questions, "right": right}
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    op, size = "plot_captions", len(images)
    fits = size > 0 and all(n == size for n in lengths.values())
    require(op, fits, "all must be as many as images, not 0, got {} and {}", size, lengths)
    cells = []
    for i, people in enumerate(references):
        listed = not isinstance(people, str) and len(people) > 0
        require(op, listed, "each of references must be a list of texts, got {!r} at {}", people, i)
        sign, frame = ("", None) if right is None else (mark(right[i]) + " ", colour_of(right[i]))
        asked = [] if questions is None else [_Line(questions[i], 8.5, MIDDLE)]
        answer = _Line(sign + (captions[i] or "—"), 9.5, frame or INK)
        cells.append(_Cell(images[i], frame, [*asked, answer, _Line(people[0], 8.5, FAINT)]))
    _draw(cells, path, title)


class Exchange(NamedTuple):
    """A question of a dialogue, what a model says, and what the data says."""

    question: str
    said: str
    wanted: str
    is_right: bool


def plot_dialogues(
    images: Sequence[Any], dialogues: Sequence[Sequence[Exchange]], path: str | Path, *, title: str
) -> None:
    """Draw images [N] as of `plot_captions` with dialogues [N] about them, of one exchange or more each, as one PNG:
    questions, answers in green or red, and what is right, fainter, under a wrong one."""
    sizes = [len(dialogue) for dialogue in dialogues]
    fits = len(images) > 0 and len(sizes) == len(images) and all(sizes)
    sentence = "dialogues must be of one exchange or more for each of the images, not 0, got {} for {}"
    require("plot_dialogues", fits, sentence, sizes, len(images))
    cells = []
    for image, dialogue in zip(images, dialogues):
        lines: list[_Line] = []
        for question, said, wanted, is_right in dialogue:
            lines += [_Line(question, 8.5, MIDDLE)] if question else []
            lines.append(_Line(f"{mark(is_right)} {said or '—'}", 9.5, colour_of(is_right)))
            lines += [] if is_right else [_Line(wanted, 8.5, FAINT)]
        cells.append(_Cell(image, None, lines))
    _draw(cells, path, title)


def plot_reconstructions(
    originals: Sequence[Any], masked: Sequence[Any], reconstructed: Sequence[Any], path: str | Path, *, title: str
) -> None:
    """Draw images [N] as of `plot_captions`, what a model sees of them, and what it makes of that, a row each, as one
    PNG."""
    lengths = [len(x) for x in (originals, masked, reconstructed)]
    what = "originals, masked, reconstructed must be as many, not 0, got {}"
    require("plot_reconstructions", lengths == [max(1, len(originals))] * 3, what, lengths)
    figure = Figure(figsize=(5.2, 0.6 + 1.65 * len(originals)), facecolor="white", layout="constrained")
    axes = figure.subplots(len(originals), 3, squeeze=False)
    for row, images in zip(axes, zip(originals, masked, reconstructed, strict=True), strict=True):
        for cell, image in zip(row, images, strict=True):
            draw_image(cell, image, None)
    for cell, name in zip(axes[0], ("original", "masked", "reconstructed"), strict=True):
        cell.set_title(name, fontsize=9, color=FAINT)
    figure.suptitle(wrap(title, 60, 3), fontsize=10, color=INK, fontweight="bold", parse_math=False)
    save(figure, path)


def plot_alignments(
    images: Sequence[Any],
    words: Sequence[Sequence[str]],
    cosines: Sequence[Any],
    is_whole: Sequence[Any],
    *,
    path: str | Path,
    title: str,
) -> None:
    """Draw each image as of `plot_captions` in a row, and again for each word of its caption under that word's cosines
    with the patches, the nearest patch framed, as one PNG.

    Args:
        images: [N].
        words: [N] lists of W.
        cosines: [N] of [W, side, side].
        is_whole: [N] of [W]: words to which the image as a whole is nearer than any patch, drawn fainter and unframed.
    """
    lengths = [len(x) for x in (images, words, cosines, is_whole)]
    what = "images, words, cosines, is_whole must be as many, not 0, got {}"
    require("plot_alignments", lengths == [max(1, len(images))] * 4, what, lengths)
    families, most = families_for([word for row in words for word in row]), max(map(len, words))
    figure = Figure(figsize=(1.15 * (most + 1), 0.6 + 1.4 * len(images)), facecolor="white", layout="constrained")
    axes = figure.subplots(len(images), most + 1, squeeze=False)
    for row, image, caption, maps, whole in zip(axes, images, words, cosines, is_whole, strict=True):
        for cell in row:
            cell.axis("off")
        draw_image(row[0], image, None)
        for cell, word, near, is_faint in zip(row[1:], caption, maps, whole, strict=False):
            _draw_map(cell, np.asarray(image), np.asarray(near), faint=bool(is_faint))
            said = escape_undrawable(word, families)[0]
            style = {"fontsize": 9, "color": FAINT if is_faint else INK, "family": families, "parse_math": False}
            cell.set_title(wrap(said, 12, 2), pad=3, **style)
    figure.suptitle(wrap(title, 80, 3), fontsize=11, color=INK, fontweight="bold", parse_math=False)
    save(figure, path)


def _draw_map(axes: Any, image: np.ndarray, near: np.ndarray, *, faint: bool) -> None:
    """An image under a map of its patches, the largest of which is framed unless it is `faint`."""
    draw_image(axes, image, None)
    height, width = image.shape[:2]
    place = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(near, cmap="viridis", alpha=0.25 if faint else 0.6, extent=place, interpolation="nearest")
    if not faint:
        y, x = np.unravel_index(near.argmax(), near.shape)
        patch = height / near.shape[0], width / near.shape[1]
        corner = (x * patch[1] - 0.5, y * patch[0] - 0.5)
        axes.add_patch(Rectangle(corner, patch[1], patch[0], fill=False, ec=WRONG, lw=2.2, clip_on=False))


class _Line(NamedTuple):
    text: str  # a paragraph below an image
    size: float
    colour: str


class _Cell(NamedTuple):
    image: Any
    frame: str | None  # its colour
    lines: Sequence[_Line]


def _draw(cells: Sequence[_Cell], path: str | Path, title: str) -> None:
    families = families_for([line.text for cell in cells for line in cell.lines])
    figure = Figure(facecolor="white", dpi=DPI)
    FigureCanvasAgg(figure)  # measures texts
    texts, undrawable = [], False
    for cell in cells:
        texts.append([])
        for line in cell.lines:
            shown, lost = escape_undrawable(line.text, families)
            undrawable |= lost
            texts[-1].append(_paragraph(figure, line._replace(text=shown), families))
    height = _lay_out(figure, cells, texts)
    figure.text(0, 1 + 0.2 / height, title, fontsize=12, color=INK, fontweight="bold", parse_math=False)
    if undrawable:
        figure.text(0, -0.15 / height, FONT_NOTE, fontsize=8.5, color=WRONG, va="top")
    save(figure, path)


def _paragraph(figure: Figure, line: _Line, families: list[str]) -> Text:
    """Text in lines as wide as a cell, to be placed by its top left corner."""
    shown = wrap(line.text, int(72 * _CELL / (0.55 * line.size)), 10)
    style = {"fontsize": line.size, "color": line.colour, "family": families, "va": "top", "parse_math": False}
    drawn = figure.text(0, 0, shown, **style)
    # capitals are wider than a column
    drawn.set_fontsize(line.size * min(1, _CELL / _extent(drawn)[0]))
    return drawn


def _extent(text: Text) -> np.ndarray:
    assert text.figure is not None
    return np.array(text.get_window_extent().size) / text.figure.dpi


def _lay_out(figure: Figure, cells: Sequence[_Cell], texts: Sequence[Sequence[Text]]) -> float:
    """Places images and the texts of each in rows as high as what they hold; the height of all, in inches."""
    placed = list(zip(cells, texts, strict=True))
    rows = [placed[i : i + _COLUMNS] for i in range(0, len(placed), _COLUMNS)]
    sizes = [[np.asarray(cell.image).shape for cell, _ in row] for row in rows]
    above = [_CELL * min(1, max(h / w for h, w, *_ in row)) for row in sizes]
    below = [max(sum(_extent(text)[1] + 0.07 for text in of_cell) for _, of_cell in row) for row in rows]
    height, width = sum(above) + sum(below) + _GAP * (len(rows) - 1), len(rows[0]) * (_CELL + _GAP) - _GAP
    figure.set_size_inches(width, height)
    y = height
    for row, image_height, text_height in zip(rows, above, below):
        y -= image_height
        for i, (cell, of_cell) in enumerate(row):
            x, line = i * (_CELL + _GAP), y
            box = (x / width, y / height, _CELL / width, image_height / height)
            draw_image(figure.add_axes(box, anchor="SW"), cell.image, cell.frame)
            for text in of_cell:
                text.set_position((x / width, (line - 0.07) / height))
                line -= _extent(text)[1] + 0.07
        y -= text_height + _GAP
    return height
