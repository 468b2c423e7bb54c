"""Curves and retrieval sheets: what is drawn, in which colour, and what is said when a font is missing."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mmcore.report import fonts, sheets
from mmcore.report.pictures import plot_curves, plot_retrieval
from mmcore.report.sheets import Exchange, plot_captions, plot_dialogues
from tests.refusals import refuses

GREEN, RED = (26, 143, 76), (208, 52, 44)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def share_of(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(pixels - np.array(colour)).max(axis=-1) < 12).mean())


def run(num: int, **extra: float) -> list[dict[str, float]]:
    return [{"step": i, "loss": 5.0 / (i + 1), "lr": 1e-3, **extra} for i in range(num)]


def sheet(path: Path, scores: list[list[float]], relevant: list[list[bool]], **kwargs) -> np.ndarray:
    images = [np.full((8, 8, 3), 30 * i, np.uint8) for i in range(len(scores[0]))]
    queries = kwargs.pop("queries", [f"query {i}" for i in range(len(scores))])
    plot_retrieval(queries, torch.tensor(scores), torch.tensor(relevant), images, path, **kwargs)
    return pixels_of(path)


def test_right_images_are_framed_green_and_wrong_ones_red(tmp_path: Path):
    scores = [[3.0, 2.0, 1.0]]
    right = sheet(tmp_path / "a.png", scores, [[True] * 3])
    wrong = sheet(tmp_path / "b.png", scores, [[False] * 3])
    mixed = sheet(tmp_path / "c.png", scores, [[True, False, False]])
    assert share_of(right, GREEN) > 0.01 and share_of(right, RED) == 0
    assert share_of(wrong, RED) > 0.01 and share_of(wrong, GREEN) == 0
    assert share_of(mixed, RED) == pytest.approx(2 * share_of(mixed, GREEN), rel=0.15)


def test_the_best_images_come_first_and_only_so_many(tmp_path: Path):
    # the right image has the third score: in a sheet of two it is not there
    scores, relevant = [[1.0, 3.0, 2.0]], [[True, False, False]]
    assert share_of(sheet(tmp_path / "a.png", scores, relevant, top_k=2), GREEN) == 0
    three = sheet(tmp_path / "b.png", scores, relevant, top_k=9)
    columns = np.flatnonzero((np.abs(three - np.array(GREEN)).max(axis=-1) < 12).any(axis=0))
    reds = np.flatnonzero((np.abs(three - np.array(RED)).max(axis=-1) < 12).any(axis=0))
    assert columns.min() > reds.max()


def test_dollar_signs_and_braces_in_captions_are_plain_text(tmp_path: Path):
    sheet(tmp_path / "a.png", [[1.0]], [[True]], queries=[r"costs $5_{x$ or \frac{"])


def test_characters_without_a_font_are_code_points_and_the_sheet_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fonts, "_faces", lambda: {fonts.BASE_FONT: fonts.BASE_FONT})
    monkeypatch.setattr(fonts, "_codepoints", lambda path: frozenset(range(256)))
    assert fonts.families_for(["a 猫"]) == [fonts.BASE_FONT]
    assert fonts.escape_undrawable("a\t猫b", [fonts.BASE_FONT]) == ("a U+732B b", True)
    assert fonts.escape_undrawable("plain  text", [fonts.BASE_FONT]) == ("plain text", False)
    said = sheet(tmp_path / "a.png", [[1.0]], [[True]], queries=["a 猫"])
    silent = sheet(tmp_path / "b.png", [[1.0]], [[True]], queries=["a cat"])
    # the note is the only red on a sheet of right images
    assert share_of(said, RED) > 0 and share_of(silent, RED) == 0


@pytest.mark.parametrize(("text", "expected"), [
    ("", ""), ("one two three", "one two\nthree"), ("unbreakableword", "unbreaka\nbleword"),
    ("一只猫在睡觉", "一只猫在\n睡觉"),
    ("一只猫在，睡觉", "一只猫\n在，睡觉"), ("a b c d e f g h i j k", "a b c d\ne f g h\ni j k"),
    ("one two three four five six seven", "one two\nthree\nfour…"),
])  # fmt: skip
def test_captions_are_wrapped_by_columns_and_cut(text: str, expected: str):
    assert fonts.wrap(text, 8, 3) == expected


def test_losses_that_are_not_finite_are_marked_in_red(tmp_path: Path):
    records = run(60)
    plot_curves(records, tmp_path / "a.png")
    records[10]["loss"], records[20]["loss"] = float("nan"), float("inf")
    plot_curves(records, tmp_path / "b.png")
    assert share_of(pixels_of(tmp_path / "a.png"), RED) == 0 < share_of(pixels_of(tmp_path / "b.png"), RED)


def test_bad_arguments_of_the_pictures_are_refused(tmp_path: Path):
    path, one = tmp_path / "x.png", torch.ones(1, 1)
    refuses("records must hold at least one record, got none", plot_curves, [], path)
    refuses(r"each record must hold step and loss, got \['loss'\] at 0", plot_curves, [{"loss": 1.0}], path)
    for queries, scores, relevant in (
        ([], one, one > 0),
        (["a"], one, one),
        (["a"], torch.ones(2, 1), one > 0),
        (["a"], torch.ones(1, 0), torch.ones(1, 0) > 0),
    ):
        with pytest.raises(ValueError, match="scores and bool relevant must be"):
            plot_retrieval(queries, scores, relevant, [np.zeros((2, 2), np.uint8)], path)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        plot_retrieval(["a"], one, one > 0, [np.zeros((2, 2), np.uint8)], path, top_k=0)
    assert not path.exists()


class TestCaptions:
    WORDS = "a red apple on a plate with a description that goes on for several lines and ends here"
    CAPTIONS = (WORDS, "", "Donaudampfschifffahrtsgesellschaftskapitänsmütze", "$x^2$ for $5", *["a frog"] * 4)

    def sheet(self, path: Path, **more: Any) -> None:
        shapes = [(20, 30, 3), (30, 20, 3), (8, 8)]
        images = [np.zeros(shapes[i % 3], np.uint8) for i in range(len(self.CAPTIONS))]
        people = [["A frog.", "Another."]] * len(images)
        plot_captions(images, self.CAPTIONS, people, path, title="captions", **more)

    def test_no_text_lies_on_another_or_on_a_picture_and_none_is_wider_than_its_picture(self, tmp_path, monkeypatch):
        figures: list[Figure] = []
        save = sheets.save
        monkeypatch.setattr(sheets, "save", lambda f, path: (figures.append(f), save(f, path)))
        count = len(self.CAPTIONS)
        self.sheet(tmp_path / "c.png", questions=["What is it?"] * count, right=[True] * count)
        figure = figures[0]
        figure.canvas.draw()
        texts = [t for t in figure.texts if t.get_text()]
        assert len(texts) == 3 * count + 1
        places = [t.get_window_extent() for t in texts] + [a.get_window_extent() for a in figure.axes]
        for i, one in enumerate(places):
            for other in places[i + 1 :]:
                overlap = (min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0))
                assert min(overlap) <= 1, (i, one, other)
        widest = max(t.get_window_extent().width for t in texts[:-1])
        assert widest <= sheets._CELL * figure.dpi + 1
        shown = {t.get_text().replace("\n", " ") for t in texts}
        assert "✓ " + self.WORDS in shown and "✓ —" in shown and "A frog." in shown and "Another." not in shown

    def test_lengths_that_differ_and_pictures_without_a_reference_are_errors(self, tmp_path: Path) -> None:
        plot, image = partial(plot_captions, path=tmp_path / "x.png", title=""), np.zeros((8, 8), np.uint8)
        refuses("plot_captions: all must be as many as images, not 0, got 1", plot, [image], ["a", "b"], [["c"]])
        refuses("plot_captions: all must be as many as images", plot, [], [], [])
        refuses(r"each of references must be a list of texts, got \[\] at 0", plot, [image], ["a"], [[]])


class TestDialogues:
    RIGHT = Exchange("what is it?", "a dog", "a dog", True)
    WRONG = Exchange("", "", "a cat that sits on a mat", False)

    def test_a_wrong_answer_stands_above_what_is_right(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        figures: list[Figure] = []
        monkeypatch.setattr(sheets, "save", lambda f, path: figures.append(f))
        images = [np.zeros((8, 8), np.uint8)] * 2
        dialogues = [[self.RIGHT, self.WRONG], [self.RIGHT]]
        plot_dialogues(images, dialogues, tmp_path / "d.png", title="dialogues")
        shown = {text.get_text().replace("\n", " "): text for text in figures[0].texts}
        assert list(shown) == ["what is it?", "✓ a dog", "✗ —", "a cat that sits on a mat", "dialogues"]
        heights = [figures[0].texts[i].get_position()[1] for i in range(4)]
        assert heights == sorted(heights, reverse=True)

    def test_a_dialogue_of_nothing_is_an_error(self, tmp_path: Path) -> None:
        image = np.zeros((8, 8), np.uint8)
        for images, dialogues in (([], []), ([image], [[]]), ([image], [])):
            with pytest.raises(ValueError, match="plot_dialogues: dialogues must be of one exchange or more"):
                plot_dialogues(images, dialogues, tmp_path / "x.png", title="")
