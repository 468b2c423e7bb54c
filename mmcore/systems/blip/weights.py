"""BLIP's weights and settings as transformers has them, in the classes of all four kinds."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.ops import require
from mmcore.parts.bert import CROSS, ENCODER, KEYS, LAYER
from mmcore.parts.text_head import HEAD
from mmcore.systems.albef.shapes import salesforce_vision
from mmcore.systems.blip.model import BLIP, BLIPConfig, Kind
from mmcore.systems.blip.shapes import blip_text
from mmcore.weights.files import read_folder, read_json, save_folder
from mmcore.weights.layout import Layout, leading, optional, under
from mmcore.weights.pictures import with_pictures, write_pictures
from mmcore.weights.settings import Key, Settings, section, transformers_keys

VISION = {
    "class_embedding": leading("embeddings.class_embedding", 2),
    "position_embedding": leading("embeddings.position_embedding", 1),
    "patch_embed": "embeddings.patch_embedding",
    "transformer.blocks.{i}.norm1": "encoder.layers.{i}.layer_norm1",
    "transformer.blocks.{i}.attn.qkv": "encoder.layers.{i}.self_attn.qkv",
    "transformer.blocks.{i}.attn.out": "encoder.layers.{i}.self_attn.projection",
    "transformer.blocks.{i}.norm2": "encoder.layers.{i}.layer_norm2",
    "transformer.blocks.{i}.mlp": "encoder.layers.{i}.mlp",
    "norm_post": "post_layernorm",
}
"""BlipVisionModel's, for a `ViT`."""
_OWN = {f"decoder_{ours}": LAYER[ours] for ours in ("attn.qkv", "attn.out", "attn_norm.norm")}
_TEXT = {
    **{ours: theirs for ours, theirs in ENCODER.items() if "type" not in ours},
    **under("blocks.{i}", "encoder.layer.{i}", {**LAYER, **CROSS}),
}
"""BlipTextModel's, for a `BertEncoder` without types."""
_DECODER = "text_decoder.cls.predictions.decoder"
_PARTS = {
    **under("text", "text_encoder", _TEXT),
    **under("text.blocks.{i}", "text_decoder.bert.encoder.layer.{i}", _OWN),
    **under("decoder", "text_decoder.bert", _TEXT),
    **under("text_head", "text_decoder.cls.predictions", HEAD),
    "vision_proj": "vision_proj",
    "text_proj": "text_proj",
    "itm_head": "itm_head",
}
_UNREAD = (_DECODER, "text_encoder.embeddings.position_ids", "text_decoder.bert.embeddings.position_ids")


def layout(kind: Kind) -> Layout:
    """transformers' names of a kind, with our temperature, which it has not."""
    words = "text" if kind == "pretrain" else "decoder"
    rows = {**under("visual", "vision_model", VISION), **_PARTS, "temperature": optional("temp")}
    return Layout(rows, tied={"text_head.weight": f"{words}.word_embedding.weight"}, unread=_UNREAD)


_VISION_SETTINGS = {
    **transformers_keys(image_size=384, patch_size=16, width=768, num_layers=12, num_heads=12),
    **transformers_keys(mlp_dim=3072, activation="gelu", norm_eps=1e-5),
}
_TEXT_SETTINGS = {
    **transformers_keys(vocab_size=30524, width=768, num_layers=12, num_heads=8, mlp_dim=3072, norm_eps=1e-12),
    **transformers_keys(dropout=0.0, attention_dropout=0.0),
    "activation": KEYS["activation"],
    "pad_token_id": KEYS["pad_token_id"],
    "num_positions": KEYS["num_positions"],
    # which the image tower's takes the place of there too
    "image_width": Key("encoder_hidden_size", 768, lambda _, ours: ours["vision.width"]),
}
SETTINGS = Settings(
    {
        **section("vision", "vision_config", _VISION_SETTINGS),
        **section("text", "text_config", _TEXT_SETTINGS),
        "embed_dim": Key("image_text_hidden_size", 256),
        "decoder_token_id": Key("text_config.bos_token_id", 30522),
        "end_token_id": Key("text_config.sep_token_id", 102),
        "label_smoothing": Key("text_config.label_smoothing", 0.0),
        # not in transformers
        "kind": Key("blip_kind", "pretrain"),
        "encoder_token_id": Key(
            "text_config.encoder_token_id", None, lambda x, ours: ours["text.vocab_size"] - 1 if x is None else x
        ),
        "init_temperature": Key("init_temperature", 0.07),
    },
    kind=BLIPConfig,
    kinds={"vision": salesforce_vision, "text": blip_text},
    model_types=("blip",),
    written={
        "model_type": "blip",
        "dtype": "float32",
        "vision_config.model_type": "blip_vision_model",
        "text_config.model_type": "blip_text_model",
        "text_config.eos_token_id": lambda ours: ours["end_token_id"],
        "architectures": lambda ours: [ARCHITECTURES[ours["kind"]]],
    },
)
ARCHITECTURES: dict[Kind, str] = {
    "pretrain": "BlipForImageTextRetrieval",
    "retrieval": "BlipForImageTextRetrieval",
    "caption": "BlipForConditionalGeneration",
    "vqa": "BlipForQuestionAnswering",
}
"""transformers' classes; what is written of pretraining loads in all three."""


def is_blip(path: Path) -> bool:
    """Whether a path is a folder of transformers with a BLIP."""
    return (path / "config.json").is_file() and read_json("blip", path / "config.json").get("model_type") == "blip"


def kind_of(state: Mapping[str, Tensor]) -> Kind:
    """By the parts that a file has."""
    has_encoder, has_decoder = (any(n.startswith(f"text_{x}.") for n in state) for x in ("encoder", "decoder"))
    if has_encoder and has_decoder:
        return "pretrain" if "itm_head.weight" in state else "vqa"
    return "caption" if has_decoder else "retrieval"


def load_blip(folder: Path | str, *, dtype: torch.dtype | None = None) -> BLIP:
    """A BLIP of any of the four kinds in a folder that transformers or `save_blip` wrote, float32 on the CPU, whatever
    `dtype` is, in training mode. What transformers has not, the temperature, begins anew where it is not there. A
    ValueError without such a folder, of a damaged file, missing or unknown names."""
    op, folder = "load_blip", Path(folder)
    state = read_folder(op, folder)
    kind = kind_of(state)
    config = replace(SETTINGS.read(op, read_json(op, folder / "config.json")), kind=kind)
    model = BLIP(replace(config, vision=with_pictures(op, folder, config.vision)))
    if kind == "pretrain":  # both have what they share
        copies = shared(state)
        differ = [n for n, source in copies.items() if n in state and not torch.equal(state[n], state[source])]
        what = "the decoder must share all but its self-attention with the encoder, got a difference in {}"
        require(op, not differ, what, differ[:1])
        state = {n: x for n, x in state.items() if n not in copies}
    ours = model.state_dict()
    model.load_state_dict(ours | layout(kind).read(op, state, ours))
    return model


def save_blip(model: BLIP, folder: Path | str) -> None:
    """Writes a new folder that transformers' class of the model's kind loads, see `ARCHITECTURES`; of pretraining, all
    three. A ValueError of an existing folder, and of a shape that transformers' BLIP cannot have."""
    op, preprocess = "save_blip", model.config.vision.preprocess
    widths = model.config.vision.width, model.config.text.width
    what = "vision.width must be text.width {1} of a model that answers, to be written for transformers, got {0}"
    require(op, model.config.kind != "vqa" or widths[0] == widths[1], what, *widths)
    settings = SETTINGS.write(op, model.config)
    save_folder(op, folder, settings, written(model), lambda staged: write_pictures(staged, preprocess))


def written(model: BLIP) -> dict[str, Tensor]:
    """Weights by their names there, shared ones as often as they are there."""
    kind = model.config.kind
    tensors = layout(kind).write(model.state_dict())
    if kind == "pretrain":
        tensors |= {name: tensors[source].clone() for name, source in shared(tensors).items()}
    if kind != "retrieval":
        words = "text_encoder.embeddings" if kind == "pretrain" else "text_decoder.bert.embeddings"
        tensors[f"{_DECODER}.weight"] = tensors[f"{words}.word_embeddings.weight"].clone()
        tensors[f"{_DECODER}.bias"] = tensors["text_decoder.cls.predictions.bias"].clone()
    return tensors


def shared(names: Mapping[str, Any]) -> dict[str, str]:
    """Of pretraining, the decoder's names of what it shares with the encoder, and the encoder's."""
    own = ".attention."
    return {
        f"text_decoder.bert.{name.removeprefix('text_encoder.')}": name
        for name in names
        if name.startswith("text_encoder.") and own not in name and not name.endswith("position_ids")
    }
