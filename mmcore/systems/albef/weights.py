"""ALBEF's weights by the names of its published files (github.com/salesforce/ALBEF), with its momentum model and its
queues, both ways."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmcore.ops import require
from mmcore.parts.bert import CROSS, ENCODER, LAYER, BertConfig
from mmcore.parts.text_head import HEAD
from mmcore.parts.timm_vit import tower_rows
from mmcore.settings import from_json
from mmcore.systems.albef.model import ALBEF, ALBEFConfig
from mmcore.systems.albef.shapes import salesforce_vision
from mmcore.weights.files import read_folder, read_json, read_weights, save_folder
from mmcore.weights.layout import Layout, scalar, under
from mmcore.weights.pictures import with_pictures, write_pictures

FUSION = {**ENCODER, **under("blocks.{i}", "encoder.layer.{i}", {**LAYER, **CROSS})}
"""Names of a `BertEncoder` some of whose layers read images."""
_PARTS = {
    **under("visual", "visual_encoder", tower_rows("class")),
    **under("text", "text_encoder.bert", FUSION),
    **under("text_head", "text_encoder.cls.predictions", HEAD),
    "vision_proj": "vision_proj",
    "text_proj": "text_proj",
}
"""What the momentum model has too."""
_TWICE = {"decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight"}
_TWICE |= {"decoder.bias": "text_encoder.cls.predictions.bias"}
_MOMENTUM = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
_UNREAD = ("text_encoder.cls.predictions.decoder", "text_encoder.bert.embeddings.position_ids")
TIED = {"text_head.weight": "text.word_embedding.weight"}
_OTHERS = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue", *(f"{x}_m" for x in _MOMENTUM))
LAYOUT = Layout(
    {**_PARTS, "itm_head": "itm_head", "temperature": scalar("temp")},
    tied=TIED,
    unread=(*_UNREAD, *_OTHERS),
    older=(("module.", ""),),
    what="a file of ALBEF's",
)
_STUDENTS = ("itm_head", "temperature")
"""What the momentum model has not."""
KIND = "albef"


@dataclass(frozen=True)
class Published:
    """What a file of ALBEF's holds: a model, the weights of the momentum model by our names, and queues [N, E]."""

    model: ALBEF
    momentum: Mapping[str, Tensor]
    queues: Mapping[str, Tensor]


def is_albef(path: Path) -> bool:
    """Whether a path is a file of torch's, or a folder of ours with an ALBEF."""
    if path.is_file():
        return path.suffix in (".pth", ".pt")
    return (path / "config.json").is_file() and read_json("albef", path / "config.json").get("model_type") == KIND


def load_albef(path: Path | str, *, dtype: torch.dtype | None = None) -> ALBEF:
    """The model in a published file, such as ALBEF.pth, or in a folder that `save_albef` wrote, float32 on the CPU,
    whatever `dtype` is; a ValueError of a damaged file, missing or unknown names, wrong shapes."""
    return read_published(path).model


def read_published(path: Path | str) -> Published:
    """As `load_albef`, with the momentum model and the queues where the file has them."""
    op, path = "load_albef", Path(path)
    if path.is_dir():
        raw = read_json(op, path / "config.json")
        require(op, raw.get("model_type") == KIND, "config.json must be of an albef, got {}", raw.get("model_type"))
        config = from_json(ALBEFConfig, raw)
        config = replace(config, vision=with_pictures(op, path, config.vision))
        state = read_folder(op, path)
    else:
        state = LAYOUT.renamed(read_weights(op, path))
        config = _shape(op, state)
    with torch.device("meta"):
        model = ALBEF(config)
    wanted = model.state_dict()
    model.load_state_dict(LAYOUT.read(op, state, wanted), assign=True)
    theirs = {own: x for name, x in state.items() if (own := _own(name))}
    ours = {name: x for name, x in wanted.items() if not name.startswith(_STUDENTS)}
    momentum = Layout(_PARTS, tied=TIED, unread=_UNREAD, what=LAYOUT.what).read(op, theirs, ours) if theirs else {}
    queues = {name: state[f"{theirs}_queue"].T for name, theirs in _QUEUES.items() if f"{theirs}_queue" in state}
    return Published(model, momentum, queues)


_QUEUES = {"images": "image", "texts": "text"}


def _own(name: str) -> str | None:
    """Of a name in the momentum model that of the model."""
    part, _, rest = name.partition(".")
    return f"{part.removesuffix('_m')}.{rest}" if part.endswith("_m") and part.removesuffix("_m") in _MOMENTUM else None


def save_albef(
    model: ALBEF,
    folder: Path | str,
    *,
    momentum: Mapping[str, Tensor] | None = None,
    queues: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a new folder whose model.safetensors has all that a published file has, by its names.

    Args:
        momentum: weights of the momentum model by our names; None = the model's own, from which one begins anew.
        queues: "images" and "texts", [N, E]; None = none are written.
    """
    state = model.state_dict()
    tensors = published_state(state)
    taught = momentum or state
    of_momentum = published_state({n: taught[n] for n in state if not n.startswith(_STUDENTS)})
    for name, x in of_momentum.items():
        part, _, rest = name.partition(".")
        tensors[f"{part}_m.{rest}"] = x
    for ours, theirs in _QUEUES.items():
        if queues is not None:
            tensors[f"{theirs}_queue"] = queues[ours].detach().cpu().T.contiguous()
            tensors["queue_ptr"] = torch.zeros(1, dtype=torch.int64)
    config, preprocess = {"model_type": KIND, **asdict(model.config)}, model.config.vision.preprocess
    save_folder("save_albef", folder, config, tensors, lambda staged: write_pictures(staged, preprocess))


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names there, tied ones as often as a file has them."""
    tensors = LAYOUT.write(state)
    twice = {f"text_encoder.cls.predictions.{name}": tensors[source].clone() for name, source in _TWICE.items()}
    return {**tensors, **twice}


def _shape(op: str, state: Mapping[str, Tensor]) -> ALBEFConfig:
    """As the tensors' shapes tell; heads have 64 channels, dropout is the published one."""
    needed = ("visual_encoder.pos_embed", "visual_encoder.patch_embed.proj.weight", "text_encoder.bert.embeddings")
    missing = [n for n in needed if not any(name.startswith(n) for name in state)]
    require(op, not missing, "{} must hold ALBEF's towers, missing {}", LAYOUT.what, missing)

    def layers(start: str, having: str) -> list[int]:
        names = (n.removeprefix(start).partition(".") for n in state if n.startswith(start))
        return sorted({int(number) for number, _, rest in names if rest.startswith(having)})

    patch = state["visual_encoder.patch_embed.proj.weight"].shape[-1]
    _, places, width = state["visual_encoder.pos_embed"].shape
    words, positions = (state[f"text_encoder.bert.embeddings.{x}_embeddings.weight"] for x in ("word", "position"))
    of_text = "text_encoder.bert.encoder.layer."
    fused = layers(of_text, "crossattention")
    is_whole = bool(fused) and "vision_proj.weight" in state
    require(op, is_whole, "{} must be of pretraining or retrieval, got another", LAYOUT.what)
    vision = salesforce_vision(
        image_size=patch * math.isqrt(places - 1),
        patch_size=patch,
        width=width,
        num_layers=len(layers("visual_encoder.blocks.", "norm1")),
        num_heads=max(1, width // 64),
        mlp_dim=len(state["visual_encoder.blocks.0.mlp.fc1.weight"]),
    )
    text = BertConfig(
        vocab_size=len(words),
        width=words.shape[1],
        num_layers=len(layers(of_text, "attention.self.query.weight")),
        num_heads=max(1, words.shape[1] // 64),
        mlp_dim=len(state[f"{of_text}0.intermediate.dense.weight"]),
        num_positions=len(positions),
        context_length=min(64, len(positions)),
        image_width=width,
        first_cross=min(fused),
        dropout=0.1,
        attention_dropout=0.1,
    )
    return ALBEFConfig(vision, text, len(state["vision_proj.weight"]))
