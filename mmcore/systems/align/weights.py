"""ALIGN's weights and settings as transformers' AlignModel has them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.ops import require
from mmcore.parts.bert import ENCODER, KEYS, BertConfig
from mmcore.parts.foreign import ForeignVision, load_foreign_vision
from mmcore.systems.align.model import ALIGN
from mmcore.systems.clip.model import TowersConfig
from mmcore.weights.files import new_folder, read_folder, read_json
from mmcore.weights.layout import Layout, scalar, under
from mmcore.weights.pictures import write_pictures
from mmcore.weights.settings import Settings

TEXT = Layout(
    {
        **under("text.transformer", "text_model", ENCODER),
        "text.proj": "text_projection",
        "temperature": scalar("temperature"),
    },
    unread=("vision_model", "text_model.pooler", "text_model.embeddings"),
)
SETTINGS = Settings(KEYS)
MAX_TEXT = 64


def load_align(folder: Path | str, *, dtype: torch.dtype | None = None) -> ALIGN:
    """The model in a transformers folder of an AlignModel (safetensors), float32 on the CPU, whatever `dtype` is; a
    ValueError of anything else."""
    op, folder = "load_align", Path(folder)
    raw = read_json(op, folder / "config.json")
    kind = raw.get("model_type")
    require(op, kind == "align", "config.json must have model_type 'align', got {!r}", kind)
    read: dict[str, Any] = SETTINGS.read(op, raw.get("text_config") or {})
    text = BertConfig(**read, context_length=min(MAX_TEXT, read["num_positions"]))
    vision, state = load_foreign_vision(folder)
    model = ALIGN(TowersConfig(vision.width, vision, text, has_image_proj=False))
    wanted = {n: x for n, x in model.state_dict().items() if not n.startswith("visual.")}
    words = TEXT.read(op, read_folder(op, folder), wanted)
    model.load_state_dict({**words, **{f"visual.{n}": x for n, x in state.items()}})
    return model


def save_align(model: ALIGN, folder: Path | str) -> None:
    """Writes a new folder that transformers' AlignModel.from_pretrained loads; a ValueError where it exists already,
    and of towers that AlignModel does not have."""
    from transformers import AlignConfig, AlignModel  # noqa: PLC0415 (seconds, where one is written alone)

    op, vision, text = "save_align", model.config.vision, model.config.text
    what = "the {} tower must be ALIGN's to be written as an AlignModel, got {}"
    is_its = isinstance(vision, ForeignVision) and vision.settings.get("model_type") == "align_vision_model"
    require(op, is_its and not model.config.has_image_proj, what, "image", vision.summary)
    require(op, isinstance(text, BertConfig), what, "text", text.summary)
    assert isinstance(vision, ForeignVision) and isinstance(text, BertConfig)
    written = SETTINGS.write(op, {n: x for n, x in vars(text).items() if n in KEYS})
    parts = {"text_config": written, "vision_config": vision.settings}
    theirs: Any = AlignModel(AlignConfig(**parts, projection_dim=model.config.embed_dim))
    state = model.state_dict()
    body = "visual.body."
    made: dict[str, Tensor] = TEXT.write({n: x for n, x in state.items() if not n.startswith(body)})
    made |= {f"vision_model.{n.removeprefix(body)}": x.cpu() for n, x in state.items() if n.startswith(body)}
    missing = theirs.load_state_dict(made, strict=False).missing_keys
    left = [n for n in missing if not n.startswith("text_model.pooler")]
    require(op, not left, "the model must have all that an AlignModel has, missing {}", left[:3])
    with new_folder(op, Path(folder)) as staged:
        theirs.save_pretrained(staged)
        write_pictures(staged, vision.preprocess)
