"""Folders of classes: images, names and templates from files, splits, what is wrong with them, and what is measured."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmcore.data import DataConfig, PairData, open_data
from mmcore.data.opening import open_chats, open_held_out
from mmcore.data.sources import classes as source
from mmcore.data.sources.classes import ClassFolder
from mmcore.data.transforms.images import Preprocess
from mmcore.recipe import Embeds
from mmcore.systems.clip.recipe import Clip
from mmcore.tasks import zeroshot
from mmcore.tasks.subject import Options, Subject
from tests.mmcore.data_fixtures import digest, fake_tokenizer, image_bytes, spec, train_loader

SYNSETS = ["n01440764", "n01443537", "n02123045"]
NAMES = ["tench", "gold_fish", "tabby"]


def write_classes(folder: Path, each: int = 5, names: list[str] = SYNSETS) -> Path:
    """Images in folders of classes, the last of which has one of its own in a folder below."""
    for c, name in enumerate(names):
        (folder / name / "more").mkdir(parents=True)
        for i in range(each):
            place = folder / name / ("more" if i == each - 1 else "")
            (place / f"{i}.JPEG").write_bytes(image_bytes(c * each + i, kind="JPEG"))
        (folder / name / "notes.md").write_text("no image")
    return folder


def opened(folder: Path, **config: Any) -> PairData:
    return open_data(DataConfig(str(folder), **config), seed=0)


def test_images_are_trained_on_by_the_names_of_their_folders_and_split_by_class(tmp_path: Path) -> None:
    data = opened(write_classes(tmp_path, names=["tabby_cat", "dog", "ox"]))
    assert data.class_names == ["dog", "ox", "tabby cat"] and data.templates == ["a photo of a {}."]
    assert data.num_train == 12 and data.val is not None and data.val.labels == [0, 1, 2] and data.val.labels_match
    assert data.val.captions == [["a photo of a dog."], ["a photo of a ox."], ["a photo of a tabby cat."]]
    assert isinstance(data.source, ClassFolder) and sum("more" in path for path in data.source.paths) in (0, 1, 2, 3)
    batch = next(train_loader(data, spec(6), fake_tokenizer))
    assert data.class_names is not None and all(name in caption for name, caption in zip(
        [data.class_names[label] for label in batch.labels.tolist()], batch.captions, strict=True))  # fmt: skip
    again, resumed = (train_loader(data, spec(6), fake_tokenizer) for _ in range(2))
    next(again)
    resumed.load_state_dict(again.state_dict())
    assert digest(resumed, 3) == digest(again, 3)
    other = write_classes(tmp_path.with_name("other"), 2, ["dog", "ox"])
    apart = opened(tmp_path, val_data=str(other))
    assert apart.num_train == 15 and apart.val is not None and apart.val.labels == [0, 0, 1, 1]
    assert len(open_chats(DataConfig(str(tmp_path)), seed=0).train) == 12


@pytest.mark.parametrize(("name", "text"), [
    ("classnames.txt", "tench\ngold fish\ntabby, grey\n"),
    ("LOC_synset_mapping.txt", "n02123045 tabby, grey\nn01440764 tench\nn01443537\tgold_fish, Carassius\nn9 x\n"),
    ("imagenet_class_index.json", json.dumps(dict(enumerate(zip(SYNSETS, NAMES, strict=True))))),
    ("class_names.txt", json.dumps(dict(zip(SYNSETS, NAMES, strict=True)))),
])  # fmt: skip
def test_names_are_read_as_imagenets_files_have_them(name: str, text: str, tmp_path: Path) -> None:
    file = "names.json" if text.startswith("{") and name.endswith("txt") else name
    folder = write_classes(tmp_path / "train")
    (tmp_path / file).write_text(text)
    given = str(tmp_path / file) if file != name else None
    found = opened(folder, class_names=given).class_names
    assert found == ["tench", "gold fish", "tabby, grey" if name == "classnames.txt" else "tabby"]


def test_templates_are_lines_with_a_place_for_the_name(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, names=["a", "b"])
    (folder / "templates.txt").write_text("a bad photo of a {c}.\n\nthe {}\n")
    data = opened(folder)
    assert data.templates == ["a bad photo of a {}.", "the {}"]
    assert isinstance(data.source, ClassFolder) and data.source.all_captions(0) == ["a bad photo of a a.", "the a"]


def test_clips_own_are_found_in_open_clip_which_is_not_imported(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "zero_shot_metadata.py").write_text(
        "OPENAI_IMAGENET_TEMPLATES = (lambda c: f'a {c}.', lambda c: f'{c}')\nIMAGENET_CLASSNAMES = ['x'] * 1000\n"
    )
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: found)
    source._open_clip.cache_clear()
    folder = write_classes(tmp_path / "data", names=["a", "b"])
    assert opened(folder, templates="openai").templates == ["a {}.", "{}"]
    assert source.class_names(folder, [f"n{i:08d}" for i in range(1000)], "openai") == ["x"] * 1000
    with pytest.raises(
        ValueError, match="'openai' must be of ImageNet's 1,000 synset folders, got 2 folders such as 'a'"
    ):
        opened(folder, class_names="openai")
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    source._open_clip.cache_clear()
    with pytest.raises(ValueError, match=r"--templates openai must find open_clip, .*pip install open_clip_torch"):
        opened(folder, templates="openai")
    source._open_clip.cache_clear()


@pytest.mark.parametrize(("change", "config", "sentence"), [
    ({}, {}, "class_names must be given of synset folders such as 'n01440764': a file, or 'openai'"),
    ({"names.txt": "a\nb\n"}, {"class_names": "names.txt"}, "a line for each of 3 folders in their order, .* got 2"),
    ({"names.txt": "n01440764 a\nn01443537 b\n"}, {"class_names": "names.txt"}, "none for 1 of 3 .* 'n02123045'"),
    ({"names.json": "[1"}, {"class_names": "names.json"}, "class_names must be JSON, got .*names.json"),
    ({}, {"class_names": "no.txt"}, "class_names must be an existing file or 'openai', got .*no.txt"),
    ({"t.txt": "a photo\n"}, {"templates": "t.txt", "class_names": None}, r"templates must hold \{\} .* got 'a photo'"),
    ({"t.txt": "\n"}, {"templates": "t.txt"}, "templates must be a line each, got none"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(change: dict, config: dict, sentence: str, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "data", 2)
    if "templates" in config:
        (folder / "classnames.txt").write_text("a\nb\nc\n")
    for name, text in change.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        opened(folder, **{key: value and str(tmp_path / value) for key, value in config.items()})


def test_a_folder_without_classes_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have a folder of images for each class, got none"):
        opened(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"must hold images .* in the folders of its classes, got none in 1 of them"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="class_names='x' has no effect on 'digits'"):
        open_data(DataConfig("digits", class_names="x"), seed=0)


class ByColour(Clip):
    """Embeds an image by its first pixel, and a caption by its last letter."""

    def embeds(self, assets: Any, model: Any, device: Any) -> Embeds:
        def image(states: Tensor) -> Tensor:
            return F.one_hot(states[:, 0, 0, 0].long() // 100, 3).float()

        def text(captions: list[str]) -> Tensor:
            return F.one_hot(torch.tensor(["abc".index(caption[-2]) for caption in captions]), 3).float()

        return Embeds(Preprocess(8), lambda x: x, image, text)


def test_zero_shot_is_followed_on_a_folder_of_classes_beside_what_is_held_out(tmp_path: Path, capsys: Any) -> None:
    for name, shade in (("a", 0), ("b", 120), ("c", 120)):  # c looks like b
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / name / "0.png")
    recipe = ByColour(zeroshot_data=str(tmp_path))
    own = SimpleNamespace(val=None, name="pairs.csv", class_names=None, templates=None)
    subject = Subject(recipe, None, None, own, torch.device("cpu"))
    assert zeroshot.follow(subject) == {"zero-shot top-1 (--zeroshot-data)": pytest.approx(2 / 3)}
    zeroshot.report(subject, Options())
    assert f"zero-shot accuracy (--zeroshot-data {tmp_path}): 66.7 %" in capsys.readouterr().out
    given = Options(data=str(tmp_path))
    zeroshot.report(Subject(recipe, None, None, given.held_out(), torch.device("cpu")), given)
    assert capsys.readouterr().out == "zero-shot accuracy (held-out): 66.7 %\n"
    assert open_held_out(DataConfig(str(tmp_path))).num_train == 3
    with pytest.raises(ValueError, match="--zeroshot-names has no effect without --zeroshot-data, got 'x'"):
        _ = Clip(zeroshot_names="x").zeroshot
    with pytest.raises(ValueError, match="--zeroshot-data must be a folder of classes, got 'emoji'"):
        _ = Clip(zeroshot_data="emoji").zeroshot
