"""LXMERT's weights and settings as transformers' LxmertModel and the models with heads on it have them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmcore.ops import require
from mmcore.parts.bert import ENCODER, KEYS, LAYER, BertConfig
from mmcore.parts.text_head import HEAD
from mmcore.systems.lxmert.model import LXMERT
from mmcore.systems.lxmert.shapes import LxmertConfig
from mmcore.weights.files import read_folder, read_json, save_folder
from mmcore.weights.layout import Layout, Rows, under
from mmcore.weights.settings import Key, Settings, transformers_keys


def _side(name: str) -> dict[str, str]:
    """A layer of words or of regions behind the cross-attention."""
    return {
        "attn.qkv": f"{name}_self_att.self.{{query,key,value}}",
        "attn.out": f"{name}_self_att.output.dense",
        "attn_norm.norm": f"{name}_self_att.output.LayerNorm",
        "mlp.fc1": f"{name}_inter.dense",
        "mlp.fc2": f"{name}_output.dense",
        "mlp_norm.norm": f"{name}_output.LayerNorm",
    }


_CROSS: Rows = {
    "cross.q": "visual_attention.att.query",
    "cross.kv": "visual_attention.att.{key,value}",
    "cross.out": "visual_attention.output.dense",
    "cross_norm.norm": "visual_attention.output.LayerNorm",
    **{f"text.{n}": x for n, x in _side("lang").items()},
    **{f"image.{n}": x for n, x in _side("visn").items()},
}
LAYOUT = Layout(
    {
        **under("text", "lxmert", ENCODER),
        "embed.fc": "lxmert.encoder.visn_fc.visn_fc",
        "embed.norm": "lxmert.encoder.visn_fc.visn_layer_norm",
        "embed.box": "lxmert.encoder.visn_fc.box_fc",
        "embed.box_norm": "lxmert.encoder.visn_fc.box_layer_norm",
        **under("regions.{i}", "lxmert.encoder.r_layers.{i}", LAYER),
        **under("cross.{i}", "lxmert.encoder.x_layers.{i}", _CROSS),
        "pooler": "lxmert.pooler.dense",
        **under("text_head", "cls.predictions", HEAD),
        "itm": "cls.seq_relationship",
        "region_head.transform": "obj_predict_head.transform.dense",
        "region_head.norm": "obj_predict_head.transform.LayerNorm",
        **{f"region_head.{x}": f"obj_predict_head.decoder_dict.{x}" for x in ("obj", "attr", "feat")},
        "head.fc1": "answer_head.logit_fc.0",
        "head.norm": "answer_head.logit_fc.2",
        "head.fc2": "answer_head.logit_fc.3",
    },
    tied={"text_head.weight": "text.word_embedding.weight"},
    unread=("cls.predictions.decoder.weight",),
    older=[(f"{name}.", f"lxmert.{name}.") for name in ("embeddings", "encoder", "pooler")]
    + [("bert.", "lxmert."), ("module.", "")],
)
MAX_TEXT = 64
_TEXT = {name: key for name, key in KEYS.items() if name not in ("num_layers", "norm_eps", "pad_token_id")}
_TEXT |= {"num_layers": Key("l_layers", 9)} | transformers_keys(dropout=0.1, attention_dropout=0.1)


def _text(**settings: Any) -> BertConfig:
    return BertConfig(**settings, context_length=min(MAX_TEXT, settings["num_positions"]))


def _plain(config: LxmertConfig) -> LxmertConfig:
    text = replace(config.text, context_length=min(MAX_TEXT, config.text.num_positions))
    return replace(config, text=text, head="pretraining")


SETTINGS = Settings(
    {
        **{f"text.{name}": key for name, key in _TEXT.items()},
        "region_layers": Key("r_layers", 5),
        "cross_layers": Key("x_layers", 5),
        "feature_width": Key("visual_feat_dim", 2048),
        # of a grid, which transformers passes over
        "image_size": Key("image_size", 0),
        "cell_size": Key("patch_size", 0),
        "num_objects": Key("num_object_labels", 1600),
        "num_attributes": Key("num_attr_labels", 400),
        "num_answers": Key("num_qa_labels", 9500),
    },
    kind=LxmertConfig,
    kinds={"text": _text},
    model_types=("lxmert",),
    must={"visual_pos_dim": 4},
    written={"model_type": "lxmert", "dtype": "float32"},
    plain=_plain,
)
ARCHITECTURES = {"pretraining": "LxmertForPreTraining", "answers": "LxmertForQuestionAnswering"}
_OF_HEADS = ("text_head.", "itm.", "region_head.", "head.")


def _read(op: str, raw: Mapping[str, Any]) -> LxmertConfig:
    """A shape, by what a config.json says of its heads."""
    config: LxmertConfig = SETTINGS.read(op, raw)
    known = {name: head for head, name in ARCHITECTURES.items()} | {"LxmertModel": "pretraining"}
    names = raw.get("architectures") or ["LxmertForPreTraining"]
    head: Any = next((known[name] for name in names if name in known), None)
    require(op, head is not None, "config.json must have one of {} as architectures, got {}", [*known], names)
    if head == "answers":
        return replace(config, num_objects=0, num_attributes=0, head=head)
    losses = {"num_objects": "visual_obj_loss", "num_attributes": "visual_attr_loss", "num_answers": "task_qa"}
    left_out = dict.fromkeys((name for name, setting in losses.items() if not raw.get(setting, True)), 0)
    return replace(config, **left_out)


def load_lxmert(folder: Path | str, *, dtype: torch.dtype | None = None) -> LXMERT:
    """The model in a transformers folder of a LxmertModel, LxmertForPreTraining or LxmertForQuestionAnswering
    (safetensors), float32 on the CPU whatever `dtype` is. Heads that a LxmertModel has not are new. A ValueError of
    anything else."""
    op, folder = "load_lxmert", Path(folder)
    config = _read(op, read_json(op, folder / "config.json"))
    state = LAYOUT.renamed(read_folder(op, folder))
    model = LXMERT(config)
    wanted = model.state_dict()
    if all(name.startswith("lxmert.") for name in state):
        wanted = {name: x for name, x in wanted.items() if not name.startswith(_OF_HEADS)}
    model.load_state_dict(LAYOUT.read(op, state, wanted), strict=False)
    return model


def written_settings(config: LxmertConfig, answers: Sequence[str] = ()) -> dict[str, Any]:
    """config.json of a shape."""
    raw = SETTINGS.write("save_lxmert", config)
    losses = {"visual_obj_loss": config.num_objects, "visual_attr_loss": config.num_attributes}
    raw |= {name: num > 0 for name, num in (losses | {"task_qa": config.num_answers}).items()}
    raw["architectures"] = [ARCHITECTURES[config.head]]
    if answers:
        raw["id2label"] = {str(i): answer for i, answer in enumerate(answers)}
        raw["label2id"] = {answer: i for i, answer in enumerate(answers)}
    return raw


def save_lxmert(model: LXMERT, folder: Path | str, answers: Sequence[str] = ()) -> None:
    """Writes a new folder that transformers' LxmertForPreTraining or, of a model that only answers questions,
    LxmertForQuestionAnswering loads by `from_pretrained`; a ValueError where it exists already, and of a shape that
    these cannot have."""
    save_folder("save_lxmert", folder, written_settings(model.config, answers), LAYOUT.write(model.state_dict()))
