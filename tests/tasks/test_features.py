"""Frozen features measured by neighbours and a probe: which images, which k, and what cannot be measured."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import DataConfig, Preprocess, open_data
from mmcore.recipe import Represents
from mmcore.systems import entries
from mmcore.tasks import TASKS, check_capability, command, features
from mmcore.tasks.features import Options, figure
from mmcore.tasks.subject import Subject

KNN, PROBE = figure("k-NN accuracy", "colour"), figure("linear probe accuracy", "colour")


def write(folder: Path, num: int, *names: str, first: int = 0) -> Path:
    """Images of classes whose colours differ by name, and a little by number."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + num):
            rng = np.random.default_rng([i, *name.encode()])
            colour = [int(x) for x in np.random.default_rng(list(name.encode())).integers(30, 220, 3)]
            noise = rng.integers(-8, 8, (6, 6, 3)) + np.array(colour)
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def subject(data: Any) -> Subject:
    def colour(images: Tensor) -> list[Tensor]:
        assert images.dtype == torch.uint8
        return [images.double().mean((2, 3)) - 120]

    able = Represents(Preprocess(4), ("colour",), colour)
    recipe = SimpleNamespace(represents=lambda *_: able, pictures=lambda x: x)
    return Subject(recipe, None, None, data, torch.device("cpu"))


def opened(folder: Path, **options: Any) -> Any:
    return open_data(DataConfig(str(folder), **options), seed=0)


def test_what_a_run_held_out_is_measured_by_what_it_trained_on(tmp_path: Path) -> None:
    found = features.follow(subject(opened(write(tmp_path / "x", 5, "ant", "bee", "wolf"))))
    assert found == {KNN: 1.0, PROBE: 1.0}  # of 12 images, fewer than the 20 neighbours
    shuffled = opened(tmp_path / "x", shuffle_pictures=True)
    assert features.follow(subject(shuffled))[KNN] < 1


def test_other_classes_are_measured_by_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # synsets as ImageNet has them, without a file of names, and a val with some of the classes
    train = write(tmp_path / "train", 4, "n01440764", "n01443537", "n01484850")
    test = write(tmp_path / "val", 2, "n01440764", "n01484850", first=4)
    own = subject(open_data(DataConfig("digits", val_fraction=0.0), seed=0))
    assert features.report(own, Options(str(test), str(train), k=1)) == []
    printed = capsys.readouterr().out
    assert "k-NN accuracy of colour (held-out): 100.0 %" in printed and "linear probe" in printed
    (test / "n01440764/4.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 4 .* the held-out images"):
        features.report(own, Options(str(test), str(train)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": "VAL"}, "--data and --train-data must be given together, got .* and None"),
        ({"train_data": "TRAIN"}, "--data and --train-data must be given together, got None and "),
        ({"data": "VAL", "train_data": "TRAIN", "k": 9}, "k must be from 1 to the 6 training features, got 9"),
        ({"data": "VAL", "train_data": "TRAIN", "k": 0}, "k must be from 1 to the 6 training features, got 0"),
        ({"data": "VAL", "train_data": "TRAIN", "temperature": 0.0}, "temperature must be above 0, got 0"),
        ({"data": "VAL", "train_data": "TRAIN", "most": 1}, "--most must be at least 2, got 1"),
        ({"data": "TRAIN", "train_data": "TRAIN"}, "must share no images, got 6 in both"),
        ({"data": "TRAIN", "train_data": "ONE"}, "must have classes of .* alone, got the folder bee"),
        ({"data": "ONE", "train_data": "ONE"}, "must share no images, got 3 in both"),
        ({"data": "OTHER", "train_data": "ONE"}, "--train-data must have images of two or more classes, got 1 in "),
        ({"data": "nowhere", "train_data": "TRAIN"}, "data must be an existing folder of classes, got 'nowhere'"),
        ({}, "no held-out images of two or more classes: give --data and --train-data"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_sentence(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    places = {
        "TRAIN": write(tmp_path / "train", 3, "ant", "bee"),
        "VAL": write(tmp_path / "val", 1, "ant", "bee", first=7),
        "ONE": write(tmp_path / "one", 3, "ant"),
        "OTHER": write(tmp_path / "other", 3, "ant", first=7),
    }
    one_class = opened(places["ONE"])
    assert features.follow(subject(one_class)) == {} and features.report(subject(one_class), None) == []
    given = Options(**{n: str(places.get(x, x)) if isinstance(x, str) else x for n, x in options.items()})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=sentence):
        features.report(subject(one_class), given)


def test_a_run_of_a_thousand_classes_is_followed_by_neighbours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = subject(opened(write(tmp_path / "x", 5, "ant", "bee", "wolf")))
    monkeypatch.setattr(features, "MOST_PROBED", 12 * 3 * 3 - 1)
    assert list(features.follow(data)) == [KNN]


def test_the_command_refuses_a_model_without_features_and_explains_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ValueError, match="features asks for a model that represents, which a run of llava-stage2 does"):
        check_capability("features", entries("RECIPES")["llava-stage2"].load(), "a run of llava-stage2")
    with pytest.raises(SystemExit):
        command.main(["features", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(flag in printed for flag in ("--data", "--train-data", "--most", "--k", "--temperature"))
    command.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in TASKS)
