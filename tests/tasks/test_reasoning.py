"""Sentences about two images: NLVR2's layout and LAVIS's, ones derived from digits, and what is made of them."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmcore.data import DataConfig
from mmcore.data.sources.digits import DIGIT_NAMES
from mmcore.data.sources.statements import open_held_out_statements, open_statements
from mmcore.prove import with_other_images
from mmcore.recipe import Step
from mmcore.systems.vilt.reasoning import ViltNlvr2
from mmcore.tasks import check_capability, reasoning
from mmcore.tasks.subject import Subject


def nlvr2(folder: Path, split: str = "dev", pairs: int = 4, directory: int | None = None) -> Path:
    """A file as NLVR2 has it, two sentences about each pair, true where that is bright, and its images in the folders
    that NLVR2 has."""
    images = folder / "images" / split / ("" if directory is None else str(directory))
    images.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for i in range(pairs):
        for side in range(2):
            grey = Image.new("RGB", (24, 20 + 4 * i), (230, 230, 230) if i % 2 else (20, 20, 20))
            grey.save(images / f"{split}-{i}-0-img{side}.png")
        for k in range(2):
            one: dict[str, Any] = {"identifier": f"{split}-{i}-0-{k}", "label": "True" if i % 2 else "False"}
            one |= {"sentence": f"there are {k} dogs in the left image", "left_url": "http://nowhere"}
            lines.append(json.dumps(one | ({} if directory is None else {"directory": directory})))
    (folder / f"{split}.json").write_text("\n".join(lines) + "\n")
    return folder / f"{split}.json"


def test_files_of_nlvr2_are_read_with_their_images(tmp_path: Path) -> None:
    dev, train = nlvr2(tmp_path), nlvr2(tmp_path, "train", 6, directory=39)
    data = open_statements(DataConfig(str(train), val_data=str(dev)), seed=0)
    assert (data.num_train, len(data.val or ())) == (12, 8)
    one = data.train.statements[3]
    assert (one.identifier, one.text, one.is_true) == ("train-1-0-1", "there are 1 dogs in the left image", True)
    record = data.train.record(3)
    assert record.load(0).size == (24, 24) and record.images == (2, 3)
    split = open_statements(DataConfig(str(train), val_fraction=0.34), seed=0)
    assert split.val is not None and {len(split.train), len(split.val)} == {8, 4}
    sides = [{i for x in part.statements for i in x.images} for part in (split.train, split.val)]
    assert not sides[0] & sides[1]


def test_lavis_lists_and_broken_records(tmp_path: Path) -> None:
    nlvr2(tmp_path)
    images = [f"images/dev/dev-0-0-img{i}.png" for i in range(2)]
    good = {"images": images, "sentence": "two", "label": "false"}
    bad = [{**good, "label": "maybe"}, {**good, "images": images[:1]}, {"sentence": "x", "label": True}, 3]
    file = tmp_path / "list.json"
    file.write_text(json.dumps([good, good, *bad]))
    with pytest.raises(ValueError, match=r"4 of 6 records .* are broken"):
        open_statements(DataConfig(str(file)), seed=0)
    found = open_statements(DataConfig(str(file), max_broken=0.7, val_fraction=0.0), seed=0)
    assert found.num_train == 2 and found.val is None and found.train.broken.total() == 4
    (tmp_path / "images/dev/dev-0-0-img1.png").write_bytes(b"no picture")
    assert found.train.read([0, 1])[1:] == ([], [(x.identifier, "not an image") for x in found.train.statements])
    file.write_text("{")
    with pytest.raises(ValueError, match="must hold a JSON object a line, as NLVR2, or a list"):
        open_statements(DataConfig(str(file)), seed=0)
    with pytest.raises(ValueError, match="or 'digits', got 'digit'; did you mean 'digits'"):
        open_statements(DataConfig("digit"), seed=0)
    file.write_text(json.dumps([{**good, "images": ["a.png", "b.png"]}]))
    with pytest.raises(ValueError, match="image_root must be the folder of the images"):
        open_statements(DataConfig(str(file)), seed=0)


def test_derived_statements_are_half_true_and_as_they_say() -> None:
    data = open_statements(DataConfig(), seed=0)
    assert data.val is not None and abs(np.mean([x.is_true for x in data.train.statements]) - 0.5) < 0.02
    for one in data.val.statements:
        word = one.text.split()[-1]
        names = [DIGIT_NAMES[data.val.source.classes[i]] for i in one.images]  # pyright: ignore[reportAttributeAccessIssue]
        seen = names if "one of" in one.text else [names[0] if "left" in one.text else names[1]]
        assert one.is_true == (word in seen), one
    others = with_other_images(data)
    assert [x.text for x in others.val.statements] == [x.text for x in data.val.statements]
    assert sum(x.images == y.images for x, y in zip(others.val.statements, data.val.statements, strict=True)) < 20


def test_a_model_of_two_images_is_trained_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = nlvr2(tmp_path)
    torch.manual_seed(0)
    recipe = ViltNlvr2(data=DataConfig(str(file), val_data=str(nlvr2(tmp_path, "test1"))))
    data = recipe.open_data()
    assets = recipe.assets(data)
    model = recipe.build(assets)
    samples = [recipe.sample(assets, data.train.record(i), np.random.default_rng(i)) for i in range(8)]
    batch = recipe.collate(assets, samples)
    assert batch.is_true.tolist() == [0, 0, 1, 1] * 2 and len({x.grids[0] for x, *_ in [s.images for s in samples]}) > 1
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = recipe.loss(model, batch, Step(0, 1, 0))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    run: Any = SimpleNamespace(folder=tmp_path, recipe="vilt-nlvr2")
    subject = Subject(recipe, assets, model.eval(), data, torch.device("cpu"), run)
    assert reasoning.follow(subject) == {"reasoning accuracy": 1.0}
    check_capability("reasoning", recipe, "it")
    held_out = reasoning.Options(data=str(file)).held_out()
    written = reasoning.report(replace(subject, data=held_out), reasoning.Options(data=str(file)))
    assert "reasoning accuracy (held-out), 8 statements: 100.0 % (majority 50.0 %)" in capsys.readouterr().out
    said = json.loads(written[0].read_text())
    assert said[2] == {"identifier": "dev-1-0-0", "label": "True"} and len(said) == 8
    with pytest.raises(ValueError, match="--image-root has no effect without --data"):
        reasoning.Options(image_root="x")
    with pytest.raises(ValueError, match="data must be NLVR2's JSON"):
        open_held_out_statements("scattered", None)
    with pytest.raises(ValueError, match="--data must be a file, of which all is held out, got 'digits'"):
        open_held_out_statements("digits", None)
    with pytest.raises(ValueError, match=r"annotations='a\.json' has no effect on sentences about images"):
        open_statements(DataConfig(str(file), annotations="a.json"), seed=0)
