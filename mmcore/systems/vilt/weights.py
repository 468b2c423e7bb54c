"""ViLT's weights and settings as transformers' ViltModel and the models with heads on it have them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmcore.checkpoint import write_json
from mmcore.ops import require
from mmcore.parts.bert import KEYS
from mmcore.parts.text_head import HEAD
from mmcore.parts.vit_names import VIT_BLOCK, VIT_SETTINGS
from mmcore.systems.vilt.model import ViLT
from mmcore.systems.vilt.shapes import Head, ViltConfig, vilt_vision
from mmcore.weights.files import read_folder, read_json, save_folder
from mmcore.weights.layout import Layout, leading, optional, under
from mmcore.weights.pictures import FILE
from mmcore.weights.settings import Key, Settings

_TEXT = "vilt.embeddings.text_embeddings"
_CLASSIFIER = {"head.fc1": "classifier.0", "head.norm": "classifier.1", "head.fc2": "classifier.3"}
LAYOUT = Layout(
    {
        "visual.class_embedding": leading("vilt.embeddings.cls_token", 2),
        "visual.patch_embed": "vilt.embeddings.patch_embeddings.projection",
        "visual.position_embedding": leading("vilt.embeddings.position_embeddings", 1),
        **under("visual.transformer.blocks.{i}", "vilt.encoder.layer.{i}", VIT_BLOCK),
        "visual.norm_post": "vilt.layernorm",
        "text.word": f"{_TEXT}.word_embeddings",
        "text.position_embedding": f"{_TEXT}.position_embeddings.weight",
        "text.type_embedding": f"{_TEXT}.token_type_embeddings.weight",
        "text.norm": f"{_TEXT}.LayerNorm",
        "modality": "vilt.embeddings.token_type_embeddings",
        "pooler": "vilt.pooler.dense",
        **under("text_head", "mlm_score", HEAD | {"bias": "decoder.bias"}),
        # not of transformers' models, which pass it over: by the original's names
        "itm.weight": optional("itm_score.fc.weight"),
        "itm.bias": optional("itm_score.fc.bias"),
    },
    tied={"text_head.weight": "text.word.weight"},
    unread=(f"{_TEXT}.position_ids", f"{_TEXT}.token_type_ids", "mlm_score.decoder.weight"),
    older=[(f"{name}.", f"vilt.{name}.") for name in ("embeddings", "encoder", "layernorm", "pooler")]
    + [("mlm_score.bias", "mlm_score.decoder.bias")],
)
ANSWERS = replace(LAYOUT, rows={**LAYOUT.rows, **_CLASSIFIER})
RETRIEVAL = replace(LAYOUT, rows={**LAYOUT.rows, "head": "rank_output"})
_OF_HEADS = ("mlm_score", "itm_score", "rank_output", "classifier")
ARCHITECTURES: dict[Head, str] = {
    "pretraining": "ViltForMaskedLM",
    "retrieval": "ViltForImageAndTextRetrieval",
    "answers": "ViltForQuestionAnswering",
    "reasoning": "ViltForImagesAndTextClassification",
}
_VISION = {name: key for name, key in VIT_SETTINGS.items() if name != "num_channels"}
SETTINGS = Settings(
    {
        **{f"vision.{name}": key for name, key in (_VISION | {"patch_size": Key("patch_size", 32)}).items()},
        "vision.image_size": Key("image_size", 384),
        "vocab_size": KEYS["vocab_size"],
        "context_length": Key("max_position_embeddings", 40),
        "num_types": KEYS["num_types"],
        "num_modalities": Key("modality_type_vocab_size", 2),
        "num_images": Key("num_images", -1, lambda x, _: max(1, x), lambda x, _: x if x > 1 else -1),
    },
    kind=ViltConfig,
    kinds={"vision": vilt_vision},
    model_types=("vilt",),
    must={"num_channels": 3, "qkv_bias": True, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    written={"model_type": "vilt", "dtype": "float32", "max_image_length": -1},
)


def layout_of(head: Head) -> Layout:
    """Of a model that ends so."""
    return ANSWERS if head in ("answers", "reasoning") else RETRIEVAL if head == "retrieval" else LAYOUT


def _read(folder: Path) -> tuple[ViltConfig, Mapping[str, Any]]:
    """The shape in a folder, and its config.json."""
    op = "load_vilt"
    raw = read_json(op, folder / "config.json")
    config: ViltConfig = SETTINGS.read(op, raw)
    names = raw.get("architectures") or ["ViltForMaskedLM"]
    known = {name: head for head, name in ARCHITECTURES.items()} | {"ViltModel": "pretraining"}
    found = next((known[name] for name in names if name in known), None)
    require(op, found is not None, "config.json must have one of {} as architectures, got {}", [*known], names)
    num = len(raw.get("id2label") or {}) or raw.get("num_labels", 2)
    head: Any = found
    config = replace(config, head=head, num_answers=num if head in ("answers", "reasoning") else 0)
    return replace(config, vision=_with_pictures(op, folder, config.vision)), raw


def load_vilt(folder: Path | str, *, dtype: torch.dtype | None = None) -> ViLT:
    """The model in a transformers folder of a ViltModel, ViltForMaskedLM, -ForQuestionAnswering,
    -ForImageAndTextRetrieval or -ForImagesAndTextClassification (safetensors), float32 on the CPU whatever `dtype` is.
    What a ViltModel has not, heads for words and for matching, is new. A ValueError of anything else."""
    op, folder = "load_vilt", Path(folder)
    config, _ = _read(folder)
    model, state = ViLT(config), LAYOUT.renamed(read_folder(op, folder))
    wanted = model.state_dict()
    if not any(name.startswith(_OF_HEADS) for name in state):
        wanted = {name: x for name, x in wanted.items() if not name.startswith(("text_head.", "itm."))}
    model.load_state_dict(wanted | layout_of(config.head).read(op, state, wanted), strict=False)
    return model


def answers_of(folder: Path) -> tuple[str, ...]:
    """The answers of a folder's classifier, in order; none of other models."""
    config, raw = _read(folder)
    labels = raw.get("id2label") or {}
    return tuple(str(labels[name]) for name in sorted(labels, key=int)) if config.head == "answers" else ()


def save_vilt(model: ViLT, folder: Path | str, answers: Sequence[str] = ()) -> None:
    """Writes a new folder that transformers' model of that head loads by `from_pretrained`, of one for words and
    matching ViltForMaskedLM, which passes the latter over; a ValueError where it exists already, and of a shape that
    transformers' model cannot have."""
    op, head = "save_vilt", model.config.head
    config = SETTINGS.write(op, replace(model.config, head="pretraining", num_answers=0))
    config["architectures"] = [ARCHITECTURES[head]]
    if answers:
        config["id2label"] = {str(i): answer for i, answer in enumerate(answers)}
        config["label2id"] = {answer: i for i, answer in enumerate(answers)}
    save_folder(op, folder, config, layout_of(head).write(model.state_dict()), lambda x: _write_pictures(model, x))


def _write_pictures(model: ViLT, folder: Path) -> None:
    preprocess = model.config.preprocess
    settings = {
        "image_processor_type": "ViltImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": preprocess.shorter},
        "size_divisor": preprocess.patch_size,
        "resample": int(preprocess.resample),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_pad": True,
    }
    write_json(folder / FILE, settings)
    write_json(folder / "processor_config.json", {"processor_class": "ViltProcessor"})


def _with_pictures(op: str, folder: Path, vision: Any) -> Any:
    """With what the folder's image processor, if it has one, does to a picture; a ValueError of what ours cannot do."""
    if not (folder / FILE).is_file():
        return vision
    raw, sizes = read_json(op, folder / FILE), {"shortest_edge": vision.image_size}
    wanted = {"size": sizes, "size_divisor": vision.patch_size, "do_resize": True, "do_normalize": True, "do_pad": True}
    for name, value in wanted.items():
        found = raw.get(name, value)
        found = {"shortest_edge": found} if name == "size" and isinstance(found, int) else found
        require(op, found == value, "{}/{} must have {} {!r}, got {!r}", folder, FILE, name, value, found)
    names = {3: "bicubic", 2: "bilinear"}
    resample = raw.get("resample", 3)
    require(op, resample in names, "{}/{} must have resample 2 or 3, got {!r}", folder, FILE, resample)
    numbers = {name: tuple(raw.get(name) or (0.5, 0.5, 0.5)) for name in ("image_mean", "image_std")}
    return replace(vision, interpolation=names[resample], **numbers)
