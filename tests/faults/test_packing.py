"""Conversations share a row where the language model, measured, gives each what it gives it alone; else none do."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    BloomConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from mmcore.data import DataConfig
from mmcore.integrations.transformers import NAME, register
from mmcore.launch import parse
from mmcore.parts.language import tiny_tokenizer
from mmcore.parts.probe import why_not_packed
from mmcore.systems.llava.recipe import LlavaAssets, LlavaStage1
from tests.systems.cli import write_tower

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}
PACKED: dict[str, Any] = {
    "llama": partial(LlamaConfig, **SIZES, intermediate_size=128),
    "gemma": partial(GemmaConfig, **SIZES, intermediate_size=128, num_key_value_heads=2, head_dim=16),
    "gpt2": partial(GPT2Config, **GPT),
    "gpt_neox": partial(GPTNeoXConfig, **SIZES, intermediate_size=128),
}
UNPACKED: dict[str, Any] = {
    "opt": partial(OPTConfig, **SIZES, ffn_dim=128, word_embed_proj_dim=64),
    "bloom": partial(BloomConfig, hidden_size=64, n_layer=2, n_head=4),
    "mpt": partial(MptConfig, d_model=64, n_layers=2, n_heads=4),
    "falcon with alibi": partial(FalconConfig, **SIZES, alibi=True),
    "mamba": partial(MambaConfig, hidden_size=64, num_hidden_layers=2, state_size=8),
    "recurrent_gemma": partial(RecurrentGemmaConfig, **SIZES, intermediate_size=128),
    "rwkv": partial(RwkvConfig, hidden_size=64, attention_hidden_size=64, num_hidden_layers=2),
}


def language(make: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    register()
    config = make(**{"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings})
    families: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    model = families[type(config)](config).eval()
    model.set_attn_implementation(NAME)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*PACKED, *UNPACKED])
def test_what_sees_other_conversations_is_not_packed(name: str, dtype: torch.dtype) -> None:
    reason = why_not_packed(language({**PACKED, **UNPACKED}[name]).to(dtype))
    if name in PACKED:
        assert reason is None
    else:
        assert reason and any(part in reason for part in ("differ by", "takes no position_ids"))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_probe_tells_what_packing_does_to_a_conversation(name: str) -> None:
    model = language({**PACKED, **UNPACKED}[name])
    tokens = torch.arange(12)[None]
    places = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=places, use_cache=False).logits[:, 5:]
        alone = model(tokens[:, 5:], use_cache=False).logits
    is_same = torch.allclose(packed, alone, atol=1e-5)
    assert is_same == (why_not_packed(model) is None) == (name == "llama")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tower(tmp_path_factory.mktemp("tower") / "clip")


def recipe(tower: Path, folder: Path, name: str, pack: bool | None) -> LlavaStage1:
    tokenizer = tiny_tokenizer(["a scan of the digit seven\n"] * 2)
    if not folder.exists():
        language({**PACKED, **UNPACKED}[name], vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    data = DataConfig(data="digits", val_fraction=0.0)
    return LlavaStage1(data=data, vision=tower, llm=str(folder), max_length=128, pack=pack)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "mamba"])
def test_packing_is_decided_by_the_model_kept_and_said(name: str, tower: Path, tmp_path: Path) -> None:
    folder, can = tmp_path / "llm", name in PACKED
    asked = recipe(tower, folder, name, None)
    data = asked.open_data()
    assets: LlavaAssets = asked.assets(data)
    assert (assets.unpacked is None) == can
    said = asked.shown(data, assets)[0]
    assert said.startswith("several conversations share a row" if can else "each conversation has a row of its own: it")
    rng: Any = None
    batch = asked.collate(assets, [asked.sample(assets, data.train.record(i), rng) for i in range(6)])
    assert (batch.position_ids is not None) == can and (len(batch.tokens) < 6) == can
    loss, count = asked.build(assets).loss(*batch)
    assert loss.isfinite() and count > 0
    # a resumed run has what was decided, whatever a model would say today
    saved = assets.save(tmp_path)
    kept = asked.load_assets(tmp_path, saved, {}, "train")
    assert kept.unpacked == assets.unpacked
    with pytest.raises(ValueError, match="must be as in the run that is resumed"):
        replace(asked, pack=not can).load_assets(tmp_path, saved, {}, "train")
    assert replace(asked, pack=can).load_assets(tmp_path, saved, {}, "train").unpacked == assets.unpacked


def test_packing_is_a_flag() -> None:
    for flags, pack in (([], None), (["--pack"], True), (["--no-pack"], False), (["--pack", "--seed", "3"], True)):
        assert parse("llava-stage1", flags, "").pack is pack
    assert parse("llava-stage2", ["--seed", "3", "--pack", "False"], "").pack is False


def test_packing_that_was_asked_for_is_refused_with_the_reason(tower: Path, tmp_path: Path) -> None:
    for name, pack, unpacked in (
        ("llama", True, None),
        ("llama", False, "--no-pack was given"),
        ("opt", False, "--no"),
    ):
        asked = recipe(tower, tmp_path / name, name, pack)
        assert str(asked.assets(asked.open_data()).unpacked).startswith(str(unpacked))
    asked = recipe(tower, tmp_path / "opt", "opt", True)
    with pytest.raises(
        ValueError, match="--pack must not be given with this opt, give --no-pack: its logits of a probe differ by"
    ):
        asked.assets(asked.open_data())
