"""open_clip's folders of other models than a plain ViT's: read right, or refused by the name of what is different."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.weights import load_clip, save_clip
from tests.refusals import refuses
from tests.systems.clip.test_weights import small_config

# of open_clip 3.3's model_configs, what each kind has that a ViT has not; and names of its weights
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "RN50": (
        {"vision_cfg": {"layers": [3, 4, 6, 3], "width": 64, "patch_size": None}},
        r"of a ViT, got .*layers \[3, 4",
    ),
    "EVA02": ({"vision_cfg": {"timm_model_name": "eva02_base_patch16_clip_224"}}, "timm_model_name.*eva02"),
    "ConvNeXt": ({"vision_cfg": {"timm_model_name": "convnext_base"}}, "timm_model_name.*convnext"),
    "SigLIP": ({"init_logit_bias": -10, "text_cfg": {"no_causal_mask": True}}, "init_logit_bias"),
    "CoCa": ({"multimodal_cfg": {"width": 512}}, "multimodal_cfg"),
    "CLIPA": ({"vision_cfg": {"no_ln_pre": True, "pool_type": "avg"}}, "no_ln_pre"),
    "worldwide": ({"text_cfg": {"pool_type": "eos", "eos_id": 3}}, "text_cfg.pool_type"),
    "layer scale": ({"vision_cfg": {"ls_init_value": 1e-4}}, "ls_init_value"),
    "attentional pool": ({"vision_cfg": {"attentional_pool": True}}, "attentional_pool"),
    "roberta": ({"text_cfg": {"hf_model_name": "roberta-base", "hf_pooler_type": "mean_pooler"}}, "hf_model_name"),
    "norm": ({"text_cfg": {"norm_kwargs": {"eps": 1e-6}}}, "norm_kwargs.eps"),
    "heads": ({"vision_cfg": {"head_width": 0}}, "a number above 0 as model_cfg.vision_cfg.head_width, got 0"),
    "oblong": ({"vision_cfg": {"image_size": [224, 112]}}, r"model_cfg.vision_cfg.image_size, got \[224, 112\]"),
}


def folder(tmp_path: Path, change: dict[str, Any]) -> Path:
    """A plain ViT's, with its configuration changed."""
    torch.manual_seed(0)
    save_clip(CLIP(small_config()), tmp_path / "clip", format="open_clip")
    file = tmp_path / "clip/open_clip_config.json"
    raw = json.loads(file.read_text())
    for name, x in change.items():
        part = raw["model_cfg"].setdefault(name, {})
        raw["model_cfg"][name] = part | x if isinstance(x, dict) else x
    file.write_text(json.dumps(raw))
    return tmp_path / "clip"


@pytest.mark.parametrize("with_own_names", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_model_is_refused_by_what_is_different(kind: str, with_own_names: bool, tmp_path: Path) -> None:
    change, match = KINDS[kind]
    path = folder(tmp_path, change)
    if with_own_names:  # as a ResNet's and timm's towers have them
        save_file({"visual.trunk.stem.weight": torch.zeros(1)}, path / "open_clip_model.safetensors")
    refuses(f"^load_clip: open_clip_config.json must .*{match}", load_clip, path)


def test_settings_that_say_what_is_so_anyway_are_read(tmp_path: Path) -> None:
    size = small_config().vision.image_size
    vision = {"image_size": [size, size], "pool_type": "tok", "pos_embed_type": "learnable", "ls_init_value": None}
    text = {"pool_type": "argmax", "proj_type": "linear", "no_causal_mask": False, "hf_tokenizer_name": "x"}
    path = folder(tmp_path, {"vision_cfg": vision, "text_cfg": text, "custom_text": True})
    loaded: Any = load_clip(path)
    theirs = load_file(path / "open_clip_model.safetensors")
    assert loaded.config.vision == small_config().vision
    assert torch.equal(loaded.visual.class_embedding, theirs["visual.class_embedding"])


def test_names_of_neither_library_are_said_to_be_so_where_the_configuration_is_a_vits(tmp_path: Path) -> None:
    path = folder(tmp_path, {})
    save_file({"visual.stem": torch.zeros(1)}, path / "open_clip_model.safetensors")
    refuses("got neither's names", load_clip, path)
