"""LiT: what is locked stays, to the bit and without moments; its features once a step, or from a folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from mmcore import checkpoint
from mmcore.data.feature_cache import FeatureCache
from mmcore.launch import parse
from mmcore.runs import read_run
from mmcore.systems.clip.given import locked_names
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.weights import load_clip
from mmcore.systems.lit.recipe import Lit
from mmcore.train.trainer import train

FLAGS = "--data digits --batch-size 8 --log-every 1 --eval-every 99 --steps 3 --lr 3e-3"


def run(out: Path, tower: Path, *more: object) -> Any:
    words = [*FLAGS.split(), "--vision", str(tower), *map(str, more), "--out", str(out)]
    train("lit", parse("lit", words, "lit"), is_quiet=True)
    return read_run(out)


def losses(out: Path) -> list[float]:
    return [json.loads(x)["loss"] for x in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lit") / "run"
    run(out, tower, "--accum", 2, "--ema", 0.9)
    return out


def test_a_locked_tower_is_what_was_given_without_moments_and_average(done: Path, tower: Path) -> None:
    given = load_clip(tower).visual.state_dict()
    model: Any = read_run(done).model
    assert model.visual.proj is None
    for name, x in model.visual.state_dict().items():
        assert torch.equal(x, given[name]), name
    found = checkpoint.find(done)
    for key in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        names = dict(checkpoint.tensors(found, key))
        assert names and not [n for n in names if n.startswith("visual.")], key


def test_it_is_exported_as_a_clip_of_transformers(done: Path, tmp_path: Path) -> None:
    trained: Any = read_run(done)
    trained.recipe.export(trained.assets, trained.model, tmp_path / "x", "hf")
    theirs: Any = CLIPModel.from_pretrained(tmp_path / "x").eval()
    images, tokens = torch.randn(3, 3, 16, 16), trained.assets.tokenizer(["a seven", "two written by hand", "one"])
    image, text, scale = trained.model(images, tokens)
    mask = torch.ones_like(tokens)
    expected = theirs(pixel_values=images, input_ids=tokens, attention_mask=mask)
    torch.testing.assert_close(image, expected.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, expected.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale * image @ text.T, expected.logits_per_image, rtol=1e-4, atol=1e-4)


def test_a_locked_tower_runs_once_an_image_and_step_and_stays_under_zero_2(
    tower: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    seen: list[int] = []
    features = CLIP.forward

    def counted(self: CLIP, images: Any, *inputs: Any, **options: Any) -> Any:
        if images is not None and images.ndim == 4:
            seen.append(len(images))
        return features(self, images, *inputs, **options)

    def after_step(self: Lit, model: Any, step: Any) -> None:
        for name, p in model.module.visual.named_parameters():
            assert torch.equal(p, given[name]) and p.grad is None, name
        assert not model.module.visual.transformer.blocks[0].mlp.training and model.module.text.training

    given = load_clip(tower).visual.state_dict()
    monkeypatch.setattr(CLIP, "forward", counted)
    monkeypatch.setattr(Lit, "after_step", after_step)
    run(tmp_path / "x", tower, "--accum", 3, "--val-fraction", 0, "--zero", 2)
    assert sum(seen) == 3 * 24


def test_the_last_groups_are_unlocked_as_open_clip_counts_them(tower: Path) -> None:
    recipe = Lit(vision=str(tower), image_head=True, lock_image_unlocked_groups=2)
    assets = recipe.assets(recipe.open_data())
    model = recipe.build(assets)
    learns = {n for n, p in model.visual.named_parameters() if p.requires_grad}
    last = ("transformer.blocks.3.", "norm_post.", "proj.")
    assert learns == {n for n, _ in model.visual.named_parameters() if n.startswith(last)}
    model.train()
    assert not model.visual.transformer.blocks[0].training and model.visual.transformer.blocks[3].training
    assert model.text.training
    with pytest.raises(ValueError, match="must be below the 7 of this tower, got 7"):
        locked_names(Lit(vision=str(tower), lock_image_unlocked_groups=7), assets.shape)


def test_features_of_a_folder_train_as_those_of_the_tower_and_outlive_what_was_interrupted(
    tower: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    cache = tmp_path / "cache"
    found = run(tmp_path / "a", tower, "--feature-cache", cache)
    parts = sorted(cache.glob("part-*"))
    assert len(FeatureCache(cache)) == 1438 and len(parts) == 2
    parts[0].unlink()
    (cache / ".part-x.safetensors.tmp").write_bytes(b"half")
    run(tmp_path / "b", tower, "--feature-cache", cache)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
    assert len(FeatureCache(cache)) == 1438
    record = found.recipe.open_data().source.record(5)
    sample = found.recipe.sample(found.assets, record, np.random.default_rng(0))
    expected = found.model.visual.features(found.assets.preprocess([record.image]))[0]
    torch.testing.assert_close(sample.image, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"features of this tower, pictures and data, got others in .* \(weights\)"):
        FeatureCache(cache, json.loads((cache / "key.json").read_text()) | {"weights": "others"})
    with pytest.raises(ValueError, match="folder must be new or a cache's"):
        FeatureCache(tmp_path, {})
