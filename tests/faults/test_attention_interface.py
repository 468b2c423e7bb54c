"""attn_implementation="mmkernels" of models without transformers' AttentionInterface: eager's result, or a sentence."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from mmcore.integrations.transformers import NAME, register
from tests.refusals import refuses

register()
register()  # twice is once

VISION: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXT: dict[str, Any] = {"vocab_size": 50, **VISION}
SMALL: dict[str, Any] = {
    "GPTJ": hf.GPTJConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=2, rotary_dim=4),
    "GPTNeo": hf.GPTNeoConfig(
        vocab_size=50, hidden_size=32, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    ),
    "Falcon": hf.FalconConfig(**TEXT),
    "Git": hf.GitConfig(**TEXT, vision_config={**VISION, "image_size": 8, "patch_size": 4}),
    "Data2VecVision": hf.Data2VecVisionConfig(**VISION, image_size=8, patch_size=4),
    "SamVision": hf.SamVisionConfig(**VISION, image_size=16, patch_size=4, output_channels=8, global_attn_indexes=[]),
}
OWN = {"Bloom": hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2), "MPNet": hf.MPNetConfig(**TEXT)}
SENTENCE = "mmkernels: attn_implementation must be 'eager' for {}Model, which looks .*, got 'mmkernels'"


@pytest.mark.parametrize("name", SMALL)
def test_a_model_with_a_table_of_its_own_is_refused_by_name(name: str, tmp_path: Path) -> None:
    refuses(SENTENCE.format(name), hf.AutoModel.from_config, SMALL[name], attn_implementation=NAME)
    model = hf.AutoModel.from_config(SMALL[name], attn_implementation="eager")
    model.save_pretrained(tmp_path)
    refuses(SENTENCE.format(name), hf.AutoModel.from_pretrained, tmp_path, attn_implementation=NAME)
    model.set_attn_implementation(NAME)  # transformers warns, and what is there stays


def test_the_parts_of_a_composite_model_can_be_named() -> None:
    parts = {"": "eager", "vision_config": NAME}
    model = hf.AutoModel.from_config(copy.deepcopy(SMALL["Git"]), attn_implementation=parts)
    assert model.image_encoder.config._attn_implementation == NAME and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", OWN)
def test_a_model_with_its_own_attention_computes_it(name: str) -> None:
    torch.manual_seed(0)
    ours = hf.AutoModel.from_config(OWN[name], attn_implementation=NAME).eval()
    torch.manual_seed(0)
    eager = hf.AutoModel.from_config(OWN[name], attn_implementation="eager").eval()
    words = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(ours(words).last_hidden_state, eager(words).last_hidden_state)


def test_other_implementations_models_and_errors_are_as_before() -> None:
    for attention in ("eager", None):
        config = copy.deepcopy(SMALL["Falcon"])
        config._attn_implementation = attention
        hf.AutoModel.from_config(config, attn_implementation=attention)
    model = hf.AutoModel.from_config(hf.LlamaConfig(**TEXT), attn_implementation=NAME)
    assert model.config._attn_implementation == NAME
    with pytest.raises(KeyError, match="no_such_function"):
        hf.AutoModel.from_config(hf.LlamaConfig(**TEXT, hidden_act="no_such_function"))
