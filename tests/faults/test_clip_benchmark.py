"""clip_benchmark itself on an exported run, where it is installed: its loader, its metric, the same answers.

pip install --no-deps clip_benchmark open_clip_torch torchvision timm ftfy regex wcwidth
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mmcore.data import DataConfig, open_data
from mmcore.data.opening import open_held_out
from mmcore.systems.clip.recipe import Clip
from mmcore.tasks import zeroshot
from mmcore.tasks.subject import Subject
from mmcore.two_towers import PairAssets
from tests.torchvision_stub import torchvision_or_skip


def test_clip_benchmark_finds_on_an_export_what_eval_zeroshot_finds(tmp_path: Path) -> None:
    torchvision_or_skip()
    models: Any = pytest.importorskip("clip_benchmark.models", exc_type=ImportError)
    metric: Any = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", exc_type=ImportError)
    folders: Any = pytest.importorskip("torchvision.datasets", exc_type=ImportError)
    data = open_data(DataConfig("digits"), seed=0)
    assert data.val is not None and data.val.labels is not None and data.class_names is not None
    for i in range(0, len(data.val), 3):
        folder = tmp_path / "images" / data.class_names[data.val.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        data.val.raw_image(i).save(folder / f"{i}.png")
    torch.manual_seed(0)
    recipe = Clip(tokenizer="captions")
    assets: Any = recipe.assets(data)
    assert isinstance(assets, PairAssets)
    model = recipe.build(assets).eval()
    recipe.export(assets, model, tmp_path / "export", "open_clip")
    ours = zeroshot.accuracy(
        Subject(recipe, assets, model, open_held_out(DataConfig(str(tmp_path / "images"))), torch.device("cpu"))
    )
    options = {"pretrained": None, "cache_dir": None, "device": "cpu"}
    theirs, transform, tokenizer = models.load_clip("open_clip", f"local-dir:{tmp_path / 'export'}", **options)
    images = folders.ImageFolder(str(tmp_path / "images"), transform)
    classifier = metric.zero_shot_classifier(
        theirs.eval(), tokenizer, images.classes, ["a photo of a {c}."], "cpu", amp=False
    )
    # their `accuracy` makes a float of an array of one, which NumPy 2.4 refuses
    logits, labels = metric.run_classification(theirs, classifier, DataLoader(images, 32), "cpu", amp=False)
    best = logits.topk(5).indices == labels[:, None]
    assert best[:, 0].double().mean().item() == pytest.approx(ours[1], abs=1e-9) and 0 < ours[1] < 1
    assert best.any(1).double().mean().item() == pytest.approx(ours[5], abs=1e-9)
