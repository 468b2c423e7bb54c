"""What the recipes that are CLIPs export for open_clip: its names, one to one, and its features where it is installed.

pip install --no-deps open_clip_torch torchvision timm ftfy regex wcwidth
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmcore.data.text.tokenizer import Tokenizer, train_tokenizer
from mmcore.systems import entries
from mmcore.systems.clip.model import CLIP, CLIPConfig
from mmcore.systems.clip.recipe import Clip
from mmcore.two_towers import PairAssets
from tests.systems.clip.test_weights import open_clip_block, small_config
from tests.torchvision_stub import torchvision_or_skip

KINDS = {name: entry.load() for name, entry in entries("RECIPES").items()}
NAMES = sorted(name for name, kind in KINDS.items() if issubclass(kind, Clip) and "open_clip" in kind.formats)
SMALL: dict[str, dict[str, Any]] = {
    "slip": {"ssl_hidden": 16, "ssl_width": 8},
    "xclip": {"clusters": 16, "head_width": 8},
    "declip": {"head_width": 16},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a photo of a dog"] * 3, vocab_size=600, context_length=12)


def exported(name: str, tokenizer: Tokenizer, folder: Path) -> tuple[CLIP, Path]:
    """With mlps of four times the width, as open_clip's models are, and no weight as it begins."""
    config = small_config()
    text = replace(config.text, vocab_size=tokenizer.vocab_size, context_length=12, mlp_dim=64)
    text = replace(text, eos_token_id=tokenizer.eos_token_id)
    shape = CLIPConfig(12, replace(config.vision, mlp_dim=128), text, config.init_log_logit_scale)
    recipe, assets = KINDS[name](**SMALL.get(name, {})), PairAssets(shape, tokenizer)
    torch.manual_seed(0)
    model = recipe.build(assets)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    recipe.export(assets, model, folder, "open_clip")
    return model.eval(), folder


@pytest.mark.parametrize("name", NAMES)
def test_an_export_has_open_clips_names_and_shapes_and_no_other(name: str, tokenizer: Tokenizer, tmp_path: Path):
    model, folder = exported(name, tokenizer, tmp_path / "out")
    size, words = model.config.text.vocab_size, 16
    wanted: dict[str, tuple[int, ...]] = {
        "logit_scale": (), "positional_embedding": (12, words), "text_projection": (words, 12),
        "token_embedding.weight": (size, words), "ln_final.weight": (words,), "ln_final.bias": (words,),
        "visual.class_embedding": (32,), "visual.positional_embedding": (17, 32), "visual.proj": (32, 12),
        "visual.conv1.weight": (32, 3, 4, 4), "visual.ln_pre.weight": (32,), "visual.ln_pre.bias": (32,),
        "visual.ln_post.weight": (32,), "visual.ln_post.bias": (32,),
    }  # fmt: skip
    for tower, width in (("visual.transformer", 32), ("transformer", words)):
        for layer in range(2):
            block = open_clip_block(width)
            wanted |= {f"{tower}.resblocks.{layer}.{leaf}": shape for leaf, shape in block.items()}
    state = load_file(folder / "open_clip_model.safetensors")
    assert {key: tuple(x.shape) for key, x in state.items()} == wanted
    torch.testing.assert_close(state["logit_scale"], model.logit_scale[0].detach())


@pytest.mark.parametrize("name", NAMES)
def test_open_clip_computes_the_same_of_an_export(name: str, tokenizer: Tokenizer, tmp_path: Path):
    torchvision_or_skip()
    open_clip: Any = pytest.importorskip("open_clip", exc_type=ImportError)
    model, folder = exported(name, tokenizer, tmp_path / "out")
    settings = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    settings["text_cfg"].pop("hf_tokenizer_name")
    theirs = open_clip.CLIP(**settings, output_dict=True).eval()
    left = theirs.load_state_dict(load_file(folder / "open_clip_model.safetensors"), strict=False)
    assert not left.missing_keys and not left.unexpected_keys
    images, tokens = torch.randn(3, 3, 16, 16), tokenizer(["a photo", "of a dog", ""])
    expected = theirs(images, tokens)
    plain = CLIP(model.config).eval()  # FILIP's own embeddings are of all tokens
    plain.load_state_dict({key: x for key, x in model.state_dict().items() if key in plain.state_dict()})
    image, text, scale = plain(images, tokens)
    torch.testing.assert_close(image, expected["image_features"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text, expected["text_features"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scale[0], expected["logit_scale"])
