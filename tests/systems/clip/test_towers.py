"""Towers of other libraries in CLIP's recipe: their features, on our attention where it can be, and what is locked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from mmcore.ops import masks
from mmcore.parts.bert import LAYOUT, BertEncoder, read_bert
from mmcore.parts.foreign import ForeignImageTower, ForeignVision, load_foreign_text
from mmcore.parts.image_tower import ImageTower
from mmcore.parts.towers import load_pooled
from mmcore.systems.clip.model import CLIP, TowersConfig
from mmcore.systems.clip.shapes import clip_config
from tests.systems.clip.towers import BLOCK, SQUARE, moved, write_bert

KINDS: dict[str, Any] = {
    "vit": (ViTConfig, ViTModel, lambda x: x.last_hidden_state[:, 0], True),
    "vit, a classifier": (ViTConfig, ViTForImageClassification, None, True),
    "clip": (CLIPVisionConfig, CLIPVisionModel, lambda x: x.pooler_output, True),
    "siglip": (SiglipVisionConfig, SiglipVisionModel, lambda x: x.pooler_output, True),
    "dinov2": (Dinov2Config, Dinov2Model, lambda x: x.pooler_output, True),
    "convnext": (ConvNextConfig, ConvNextModel, lambda x: x.pooler_output, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_tower_of_a_folder_gives_the_features_that_it_has_there(kind: str, tmp_path: Path) -> None:
    config, model, read, is_ours = KINDS[kind]
    sizes: dict[str, Any] = {n: x for n, x in BLOCK.items() if not (kind == "dinov2" and n == "intermediate_size")}
    sizes = {"depths": [1, 1], "hidden_sizes": [8, 24], "num_stages": 2} if kind == "convnext" else sizes
    theirs = moved(model(config(**sizes, **SQUARE)))
    theirs.save_pretrained(tmp_path / "x")
    found = load_pooled(tmp_path / "x")
    shape: Any = found.config
    assert isinstance(shape, ForeignVision) != is_ours
    tower: Any = ForeignImageTower(shape, None) if not is_ours else ImageTower(shape, None, found.pool)
    tower.load_state_dict(found.state)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = theirs.double()
    expected = theirs.vit(images).last_hidden_state[:, 0] if read is None else read(theirs(images))
    torch.testing.assert_close(tower.double().eval().features(images), expected, rtol=1e-9, atol=1e-9)


def captions() -> Tensor:
    """Of all lengths from one token to the whole context."""
    return torch.randint(1, 60, (7, 7), generator=torch.Generator().manual_seed(2)).tril()


def test_bert_equals_transformers_in_states_and_every_gradient(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    theirs: Any = BertModel.from_pretrained(folder, attn_implementation="sdpa").double().eval()
    config, state = read_bert(folder, 7)
    ours = BertEncoder(config).double()
    ours.load_state_dict(state)
    tokens, weights = captions(), torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = theirs(input_ids=tokens, attention_mask=(tokens > 0).long()).last_hidden_state[:, 0]
    found = ours(tokens, masks.key_padding(tokens > 0, tokens.shape[1]))[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, grad in LAYOUT.read("test", grads, ours.state_dict()).items():
        torch.testing.assert_close(ours.get_parameter(name).grad, grad, rtol=1e-9, atol=1e-9, msg=name)


def test_another_text_encoder_is_the_mean_of_its_states_without_dropout(tmp_path: Path) -> None:
    shape = DistilBertConfig(dim=24, n_layers=1, n_heads=3, hidden_dim=40, vocab_size=60, max_position_embeddings=9)
    theirs = moved(DistilBertModel(shape))
    theirs.save_pretrained(tmp_path / "x")
    config, state = load_foreign_text(tmp_path / "x", 7, 0)
    assert config.width == 24 and config.settings["dropout"] == 0
    model = CLIP(TowersConfig(16, clip_config("tiny").vision, config))
    model.text.body.load_state_dict({n.removeprefix("body."): x for n, x in state.items()})
    tokens = captions()
    states = theirs(input_ids=tokens, attention_mask=(tokens > 0).long()).last_hidden_state
    seen = (tokens > 0).float()[..., None]
    expected = model.text.proj((states * seen).sum(1) / seen.sum(1))
    torch.testing.assert_close(model.train().text(tokens, (tokens > 0).sum(1).tolist()), expected, rtol=1e-4, atol=1e-5)
