"""R^2 of masked patches, on models whose answers are known, and its control."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import DataConfig, Preprocess, open_data
from mmcore.data.transforms.masks import hidden, random_mask
from mmcore.figures import shown
from mmcore.parts.pixels import patchify
from mmcore.prove import Found, with_other_images
from mmcore.report.sheets import plot_reconstructions
from mmcore.tasks import reconstruction
from mmcore.tasks.reconstruction import Reconstructs
from mmcore.tasks.subject import Subject


class Known:
    """A recipe that predicts `mix` of what it is shown and the rest of the mean of each place over all masked ones."""

    def __init__(self, mix: float, mean: Tensor | float = 0.0) -> None:
        self.mix, self.mean = mix, mean

    def pictures(self, data: Any) -> Any:
        return data

    def target(self, images: Tensor) -> Tensor:
        return patchify(images.float(), 4)

    def reconstructs(self, *_: Any) -> Reconstructs:
        def predict(images: Tensor, kept: Tensor) -> Tensor:
            return self.mix * self.target(images) + (1 - self.mix) * self.mean

        wanted = Preprocess(16, interpolation="bilinear")
        return Reconstructs(wanted, lambda rng: random_mask(16, 0.75, rng), self.target, predict, lambda p, x, k: x)


DATA = open_data(DataConfig(), seed=0)


def subject(recipe: Known) -> Subject:
    return Subject(recipe, None, None, DATA, torch.device("cpu"))


def r_squared(found: Subject) -> float:
    return reconstruction.figures(found)[reconstruction.FIGURE]


def masked_mean() -> Tensor:
    found = subject(recipe := Known(1.0))
    batches = reconstruction._over(found, recipe.reconstructs(), lambda batch, _: batch)
    own, kept = torch.cat([b[0] for b in batches]), torch.cat([b[2] for b in batches])
    masked = hidden(kept, 16)[:, :, None]
    return (recipe.target(own).double() * masked).sum(0) / masked.sum(0)


def test_the_truth_gives_1_the_mean_of_each_place_0_and_the_half_between_them_three_quarters() -> None:
    mean = masked_mean()
    for mix, expected in ((1.0, 1.0), (0.0, 0.0), (0.5, 0.75)):
        assert r_squared(subject(Known(mix, mean))) == pytest.approx(expected, abs=1e-5)


def test_a_control_is_shown_other_images_and_compared_with_the_records_own() -> None:
    whole = subject(Known(1.0))
    control = replace(whole, data=with_other_images(DATA), own=DATA)
    assert r_squared(control) < -0.5
    asked = replace(DATA, val=None)  # of questions, of which two are about each image
    assert r_squared(replace(whole, data=asked)) == pytest.approx(1)
    assert r_squared(replace(whole, data=with_other_images(asked), own=asked)) < -0.5


def test_an_r_squared_is_written_as_a_number_and_a_share_in_per_cent() -> None:
    found = Found("mae", "R^2 of masked patches (held-out)", 0.456, -0.7, 0.35, 0.0)
    assert found.line == "mae: R^2 of masked patches (held-out) 0.46; control -0.70; floor 0.35"
    assert found.holds and not replace(found, control=0.01).holds and not replace(found, value=0.34).holds
    assert found.json["unit"] == "R^2" and found.json["control"] == -0.7
    assert shown("zero-shot accuracy", 0.971) == "97.1 %" and shown("zero-shot accuracy", 0.9, 0) == "90 %"


def test_a_report_draws_a_row_an_image_and_says_how_near_they_come(tmp_path: Path, capsys: Any) -> None:
    run: Any = SimpleNamespace(folder=tmp_path)
    found = replace(subject(Known(1.0)), run=run)
    originals, masked, drawn = reconstruction.drawn(found)
    assert len(originals) == 8 and torch.equal(originals, drawn)
    grey = (masked == 128).all(1).float().mean((1, 2))
    assert (grey >= 0.75).all() and torch.equal(masked[masked != 128], originals[masked != 128])
    assert reconstruction.report(found, None) == [tmp_path / "reconstructions.png"]
    assert f"R^2 of masked patches (held-out), against the mean of each place, {len(DATA.val or ())} images: 1.00" in (
        capsys.readouterr().out
    )
    with Image.open(tmp_path / "reconstructions.png") as sheet:
        assert sheet.height > 2 * sheet.width and len(np.unique(np.asarray(sheet))) > 50


def test_of_images_that_are_all_alike_there_is_no_r_squared() -> None:
    assert DATA.val is not None
    one = replace(DATA.val, indices=[0], captions=[["a three"]], labels=None)
    found = replace(subject(Known(0.0)), data=replace(DATA, val=one))
    assert np.isnan(r_squared(found)) and reconstruction.follow(found) == {}


def test_without_held_out_images_nothing_is_measured_and_asking_for_it_is_an_error() -> None:
    found = replace(subject(Known(1.0)), data=replace(DATA, val=None, val_questions=None))
    assert reconstruction.follow(found) == {} and reconstruction.report(found, None) == []
    with pytest.raises(ValueError, match="digits has no held-out images: give --val-data or --val-fraction"):
        reconstruction.report(found, SimpleNamespace())
    with pytest.raises(ValueError, match=r"must be as many, not 0, got \[1, 1, 0\]"):
        plot_reconstructions([0], [0], [], "x.png", title="")
