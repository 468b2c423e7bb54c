"""Weights and settings of masked image modelling in the files of others: transformers' BEiT, data2vec and ViT, and what
unilm's code (BEiT) writes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.nn import Linear
from mmcore.ops import require
from mmcore.parts.vit import Tower, VisionConfig, ViT
from mmcore.parts.vit_names import VIT_BLOCK, VIT_SETTINGS, VIT_TOWER
from mmcore.runs import is_run, read_run
from mmcore.systems.mim.model import Mim, MimConfig
from mmcore.systems.vit.shapes import vit_vision
from mmcore.systems.vit.weights import SETTINGS as VIT_SETTINGS_OF_FOLDER
from mmcore.systems.vit.weights import save_vit
from mmcore.weights.files import read_json, read_weights
from mmcore.weights.folder import ModelFolder
from mmcore.weights.layout import Layout, Theirs, leading, under
from mmcore.weights.settings import Key, Settings

_TABLE = "relative_position_bias.relative_position_bias_table"
_INDEX = "relative_position_index"
"""What ends the names of buffers that files have, of which row of a table each pair takes."""
_OUTSIDE = ("layernorm.", "lm_head.")
"""What stands beside the tower in a model with a head."""
_BEIT_BLOCK = {
    **{name: theirs for name, theirs in VIT_BLOCK.items() if name != "attn.qkv"},
    "attn.qkv.weight": "attention.attention.{query,key,value}.weight",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "relative.table": f"attention.attention.{_TABLE}",
    "scale1": "lambda_1",
    "scale2": "lambda_2",
}
_BEIT_TOWER = {
    **VIT_TOWER,
    "mask_token": leading("embeddings.mask_token", 2),
    "relative.table": f"encoder.{_TABLE}",
    **under("transformer.blocks.{i}", "encoder.layer.{i}", _BEIT_BLOCK),
}


@dataclass(frozen=True)
class _Layout(Layout):
    """Of files that may hold indices of tables, which no model of ours needs, and whose tower's names may begin with
    `prefix`."""

    prefix: str = ""
    is_written: bool = False

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name.removeprefix(self.prefix): x for name, x in super().renamed(state).items()}
        return {name: x for name, x in found.items() if not name.endswith(_INDEX)}

    def write(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().write(state)
        if not self.is_written:
            return found
        return {name if name.startswith(_OUTSIDE) else self.prefix + name: x for name, x in found.items()}


@dataclass(frozen=True)
class BeitConfig:
    """Shape of a BEiT as a folder has it: `vocab_size` of its head, None = there is none."""

    vision: VisionConfig
    vocab_size: int | None = None


class BeitModel(nn.Module):
    """A tower, `visual`, and BEiT's `head` where there is one."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision)
        self.head = None if config.vocab_size is None else Linear(config.vision.width, config.vocab_size)

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] to the tower's states, [B, 1 + P, D], or with a head to its logits of patches, [B, P, V]."""
        states = self.visual(images, masked=masked)
        return states if self.head is None else self.head(states[:, 1:])

    def image_tower(self) -> Tower:
        """The tower."""
        return Tower(self.config.vision, self.visual.state_dict())


_SWITCH = {"shared": "use_shared_relative_position_bias", "layers": "use_relative_position_bias"}
_VISION = {
    **VIT_SETTINGS,
    "positions": Key(
        "use_absolute_position_embeddings", False, lambda x, _: "learned" if x else "none", lambda x, _: x == "learned"
    ),
    "layer_scale": Key("layer_scale_init_value", 0.1, lambda x, _: x if x > 0 else None, lambda x, _: x or 0.0),
    "drop_path": Key("drop_path_rate", 0.1),
    "has_mask_token": Key("use_mask_token", False),
    "relative_positions": Key("relative_positions", "none", write=lambda *_: ...),
}


def _current(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings with one in place of two that exclude each other."""
    on = [name for name, theirs in _SWITCH.items() if raw.get(theirs)]
    require("load_beit", len(on) < 2, "config.json must have one kind of relative positions at most, got {}", on)
    return {**raw, "relative_positions": on[0] if on else "none"}


_beit_vision = partial(vit_vision, qkv_bias="q and v")
_MUST = {"num_channels": 3, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}


def _settings(model_type: str, *, has_head: bool) -> Settings:
    name = "Data2VecVisionModel" if model_type == "data2vec-vision" else "BeitModel"
    return Settings(
        {
            **{f"vision.{ours}": key for ours, key in _VISION.items()},
            **({"vocab_size": Key("vocab_size", 8192)} if has_head else {}),
        },
        kind=BeitConfig,
        kinds={"vision": _beit_vision},
        model_types=(model_type,),
        must=_MUST,
        written={
            **{theirs: partial(_is_on, name) for name, theirs in _SWITCH.items()},
            "architectures": ["BeitForMaskedImageModeling" if has_head else name],
            "model_type": model_type,
            "use_mean_pooling": has_head,  # without a head the final norm is the tower's
            "dtype": "float32",
        },
        current=_current,
    )


def _is_on(name: str, ours: Mapping[str, Any]) -> bool:
    return ours["vision.relative_positions"] == name


_ROWS = {**{f"visual.{name}": theirs for name, theirs in _BEIT_TOWER.items()}, "head": "lm_head"}


def folder_of(model_type: str, *, has_head: bool) -> ModelFolder:
    prefix = "beit." if model_type == "beit" else "data2vec_vision."
    layout = _Layout(_ROWS, unread=("pooler", "classifier"), prefix=prefix, is_written=has_head)
    return ModelFolder(model_type, BeitModel, _settings(model_type, has_head=has_head), layout)


def _load(model_type: str, folder: Path | str, *, dtype: torch.dtype | None = None) -> BeitModel:
    op, raw = f"load_{model_type}", read_json("load_beit", Path(folder) / "config.json")
    has_head = "MaskedImageModeling" in str(raw.get("architectures"))
    has_one = not has_head or raw.get("use_mean_pooling", True)
    require(
        op, has_one, "config.json must have use_mean_pooling with a head, or there are two final norms, got {}", False
    )
    return folder_of(model_type, has_head=has_head).load(folder)


load_beit, load_data2vec = partial(_load, "beit"), partial(_load, "data2vec-vision")
"""The model in a folder of BeitModel, BeitForMaskedImageModeling or Data2VecVisionModel; errors as of `ModelFolder`."""


def save_beit(model: BeitModel, folder: Path | str, model_type: str = "beit") -> None:
    """Writes a folder of BeitForMaskedImageModeling, or without a head of BeitModel or Data2VecVisionModel."""
    folder_of(model_type, has_head=model.head is not None).save(model, folder)


def _as_convolution(x: Tensor) -> Tensor:
    """Rows of (row, column, colour) of a patch as PixelShuffle wants them, (colour, row, column), and a 1 x 1
    convolution of them."""
    side = math.isqrt(len(x) // 3)
    x = x.unflatten(0, (side, side, 3)).movedim(2, 0).flatten(0, 2)
    return x[:, :, None, None] if x.ndim == 2 else x


def _as_linear(x: Tensor) -> Tensor:
    """The inverse."""
    side = math.isqrt(len(x) // 3)
    x = x.unflatten(0, (3, side, side)).movedim(0, 2).flatten(0, 2)
    return x.flatten(1) if x.ndim == 4 else x


def _outputs(stride: Any, _: Any) -> int:
    return 3 * stride**2


def _stride(outputs: int, _: Any) -> int:
    return math.isqrt(outputs // 3)


_PIXELS = {
    "head.weight": Theirs("decoder.0.weight", _as_convolution, _as_linear),
    "head.bias": Theirs("decoder.0.bias", _as_convolution, _as_linear),
}
SIMMIM_FOLDER = ModelFolder(
    "simmim",
    Mim,
    replace(
        VIT_SETTINGS_OF_FOLDER,
        keys={**VIT_SETTINGS_OF_FOLDER.keys, "outputs": Key("encoder_stride", 16, _outputs, _stride)},
        kind=MimConfig,
        kinds={"vision": partial(vit_vision, has_mask_token=True)},
        written={**VIT_SETTINGS_OF_FOLDER.written, "architectures": ["ViTForMaskedImageModeling"]},
    ),
    Layout({**under("visual", "vit", {**VIT_TOWER, "mask_token": leading("embeddings.mask_token", 2)}), **_PIXELS}),
)
load_simmim = SIMMIM_FOLDER.load
"""The model in a folder of ViTForMaskedImageModeling; errors as of `ModelFolder`."""


def save_mim(model: Mim, folder: Path | str, *, predicts: str, model_type: str = "beit") -> None:
    """Writes what the field loads of a model: with BEiT's biases BeitForMaskedImageModeling where tokens are predicted,
    else BeitModel (or Data2VecVisionModel), or with all biases ViTForMaskedImageModeling of pixels, else ViTModel."""
    config = model.config
    if predicts == "pixels" and config.vision.qkv_bias == "all":
        return SIMMIM_FOLDER.save(model, folder)
    if predicts != "tokens":
        return save_tower(Tower(config.vision, model.visual.state_dict()), folder, model_type)
    plain: Any = BeitModel(BeitConfig(config.vision, config.outputs))
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("class_branch.")})
    return save_beit(plain, folder, model_type)


def save_tower(tower: Tower, folder: Path | str, model_type: str = "beit") -> None:
    """Writes a tower with BEiT's biases as BeitModel or Data2VecVisionModel, another as ViTModel; a mask token is left
    out."""
    if tower.config.qkv_bias == "all":
        return save_vit(tower, folder)
    plain: Any = BeitModel(BeitConfig(replace(tower.config, has_mask_token=False)))
    plain.visual.load_state_dict({name: x for name, x in tower.state.items() if name != "mask_token"})
    return save_beit(plain, folder, model_type)


_PUBLISHED_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.q_bias": "attn.q_bias",
    "attn.v_bias": "attn.v_bias",
    "attn.out": "attn.proj",
    "relative.table": "attn.relative_position_bias_table",
    "scale1": "gamma_1",
    "scale2": "gamma_2",
    "norm2": "norm2",
    "mlp": "mlp",
}
_published = {
    "visual.class_embedding": leading("cls_token", 2),
    "visual.mask_token": leading("mask_token", 2),
    "visual.patch_embed": "patch_embed.proj",
    "visual.position_embedding": leading("pos_embed", 1),
    "visual.relative.table": "rel_pos_bias.relative_position_bias_table",
    **under("visual.transformer.blocks.{i}", "blocks.{i}", _PUBLISHED_BLOCK),
    **under("class_branch.blocks.{i}", "cls_pt_layers.{i}", _PUBLISHED_BLOCK),
    "visual.norm_post": "norm",
}
_EVA_HEADS = {1408: 16}
PUBLISHED = _Layout({**_published, "head": "lm_head"}, what="a file of unilm's or EVA's code")
"""Names in the files of BEiT, BEiT v2 and EVA as they are published."""
PUBLISHED_SIMMIM = _Layout({**_published, **_PIXELS}, older=(("encoder.", ""),), what="a file of SimMIM's code")
"""Names in the files of SimMIM as they are published."""


def read_published(op: str, file: Path, model: Mim) -> dict[str, Tensor]:
    """The weights of a published file by their names in a model; a ValueError of another model's."""
    state = read_weights(op, file)
    layout = PUBLISHED_SIMMIM if "decoder.0.weight" in state else PUBLISHED
    return layout.read(op, state, model.state_dict())


def read_start(op: str, path: Path, model: Mim) -> dict[str, Tensor]:
    """The weights that a run starts from, by their names in its model: of a published file, of a run of such a model,
    or of a folder of transformers; a ValueError of another model's."""
    require(op, path.exists(), "--init must be a file, a run or a folder, got {}, which does not exist", path)
    if path.is_file():
        return read_published(op, path, model)
    if is_run(path):
        state = read_run(path).model.state_dict()
    else:
        kind = read_json(op, path / "config.json").get("model_type")
        load = {"vit": load_simmim, "beit": load_beit, "data2vec-vision": load_data2vec}.get(str(kind))
        require(op, load is not None, "--init must be of a vit, a beit or a data2vec-vision, got {}", kind)
        assert load is not None
        state = load(path).state_dict()
    wanted = model.state_dict()
    found = {name: x for name, x in state.items() if name in wanted and x.shape == wanted[name].shape}
    missing = [name for name in wanted if name.startswith("visual.") and name not in found]
    may_miss = missing in ([], ["visual.mask_token"])
    require(op, may_miss, "--init must hold the tower of --model, missing {} or of another shape", missing[:3])
    return found


def published_tower(state: Mapping[str, Tensor]) -> Tower | None:
    """The tower of what a published file holds of BEiT, BEiT v2, EVA or SimMIM, whose heads are 64 wide but for EVA's;
    None of others."""
    op = "load_tower"
    state = {name.removeprefix("encoder."): x for name, x in state.items()}
    if "blocks.0.attn.q_bias" not in state or "cls_token" not in state:
        return None
    patch, width = state["patch_embed.proj.weight"].shape[-1], state["cls_token"].shape[-1]
    table = next((x for name, x in state.items() if name.endswith("relative_position_bias_table")), None)
    is_shared, positions = "rel_pos_bias.relative_position_bias_table" in state, state.get("pos_embed")
    side = (math.isqrt(len(table) - 3) + 1) // 2 if table is not None else None
    side = math.isqrt(positions.shape[1] - 1) if positions is not None else side
    require(op, side is not None, "a published file must hold positions of patches, got {}", None)
    assert side is not None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = table.shape[1] if table is not None else _EVA_HEADS.get(width, max(1, width // 64))
    sizes = side * patch, patch, width, depth, heads, len(state["blocks.0.mlp.fc1.weight"])
    vision = _beit_vision(
        *sizes,
        positions="none" if positions is None else "learned",
        relative_positions="none" if table is None else "shared" if is_shared else "layers",
        layer_scale=0.1 if "blocks.0.gamma_1" in state else None,
    )
    with torch.device("meta"):
        wanted = {f"visual.{name}": x for name, x in ViT(vision).state_dict().items()}
    unread = ("mask_token", "lm_head", "cls_pt_layers", "decoder", "head")
    found = PUBLISHED.read(op, state, wanted, unread=unread)
    return Tower(vision, {name.removeprefix("visual."): x for name, x in found.items()})
