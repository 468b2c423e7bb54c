"""Folders that hold code of their own, or settings of another type than the library that wrote them has."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from mmcore.checkpoint import write_json
from mmcore.parts.language import load_language_model, load_language_tokenizer
from mmcore.parts.tiny_lm import train_tiny_lm
from mmcore.parts.towers import load_tower
from mmcore.systems.blip2.shapes import blip2_config
from mmcore.systems.blip2.weights import STAGE1_SETTINGS as BLIP2
from mmcore.systems.clip.model import CLIP, CLIPConfig
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmcore.systems.clip.weights import load_clip, save_clip
from mmcore.systems.llava.model import LlavaConfig
from mmcore.systems.llava.weights import HF_SETTINGS as LLAVA
from mmcore.systems.siglip.shapes import siglip_config
from tests.refusals import refuses


def test_a_folders_own_code_is_refused_without_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _ = train_tiny_lm([[("what is it?", "a dog")]] * 4, seed=0, steps=1)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    for name, owner, load in (
        ("config.json", "AutoConfig", load_language_model),
        ("tokenizer_config.json", "AutoTokenizer", load_language_tokenizer),
    ):
        file, own = tmp_path / name, {"auto_map": {owner: "own.Own"}, "model_type": "own", "tokenizer_class": "Own"}
        before = file.read_text()
        write_json(file, json.loads(before) | own)
        options = {"dtype": None} if load is load_language_model else {}
        refuses("folder must hold a .*: .*contains custom code", load, tmp_path, **options)
        file.write_text(before)


def test_a_square_of_padding_is_not_written_for_open_clip_which_has_none(tmp_path: Path) -> None:
    tiny = CLIP_CONFIGS["tiny"]
    model = CLIP(replace(tiny, vision=replace(tiny.vision, num_heads=2, fit="pad")))
    refuses(
        r"fit must be one of \['crop', 'squash'\] in the format", save_clip, model, tmp_path / "x", format="open_clip"
    )


@pytest.mark.parametrize("format", ["hf", "open_clip"])
def test_a_setting_of_another_type_is_refused_by_its_name(tmp_path: Path, format: Any) -> None:
    tiny = CLIP_CONFIGS["tiny"]
    text = replace(tiny.text, eos_token_id=None)
    save_clip(CLIP(CLIPConfig(64, replace(tiny.vision, num_heads=2), text)), tmp_path / "x", format=format)
    file = tmp_path / "x" / ("config.json" if format == "hf" else "open_clip_config.json")
    before = json.loads(file.read_text())
    theirs = {
        "hf": {
            "vision_config": {"num_attention_heads": "2", "layer_norm_eps": "1e-5", "image_size": [16, 16]},
            "text_config": {"eos_token_id": [1, 2], "hidden_act": None, "num_hidden_layers": True},
        },
        "open_clip": {"model_cfg": {"quick_gelu": "yes", "text_cfg": None}, "preprocess_cfg": {"interpolation": 3}},
    }
    for part, values in theirs[format].items():
        for name, value in values.items():
            write_json(file, {**before, part: {**before[part], name: value}})
            refuses(f"json must .*{name}.*got", load_clip, tmp_path / "x")
    for name in ("model_cfg", "preprocess_cfg") if format == "open_clip" else ():
        write_json(file, before | {name: [1]})
        refuses(f"must hold an object as {name}", load_clip, tmp_path / "x")


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "convnext"])
def test_a_tower_of_another_kind_is_refused_with_those_that_are_read(tmp_path: Path, kind: str) -> None:
    write_json(tmp_path / "config.json", {"model_type": kind})
    refuses(
        f"--vision must be a run, or a folder of a model of .*clip.*siglip.*, got .* of {kind}", load_tower, tmp_path
    )


def test_a_clip_in_several_files_is_read(tmp_path: Path) -> None:
    model = CLIP(CLIP_CONFIGS["tiny"])
    save_clip(model, tmp_path / "one")
    theirs: Any = CLIPModel.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "several", max_shard_size="1MB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    found = load_clip(tmp_path / "several").state_dict()
    assert all(torch.equal(x, found[name]) for name, x in model.state_dict().items())
    next((tmp_path / "several").glob("*.safetensors")).unlink()
    refuses("must name files that are there, missing", load_clip, tmp_path / "several")


def test_a_run_says_before_it_trains_that_its_tower_cannot_be_exported() -> None:
    on_siglip = LlavaConfig(siglip_config("tiny").vision)
    assert "none to transformers: vision.has_norm_pre must be True" in LLAVA.export_summary(on_siglip)["export"]
    assert not LLAVA.export_summary(LlavaConfig(CLIP_CONFIGS["tiny"].vision))
    assert "export" in BLIP2.export_summary(blip2_config("tiny", vision=CLIP_CONFIGS["tiny"].vision))
