"""VLMo's weights by the names of its published files (github.com/microsoft/unilm, vlmo), both ways, and what it starts
from: a tower of BEiT's."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from mmcore.nn import interpolate_positions
from mmcore.nn.relative import resized_distances
from mmcore.ops import require
from mmcore.parts.bert import ENCODER
from mmcore.parts.text_head import HEAD
from mmcore.parts.vit import Tower
from mmcore.settings import from_json
from mmcore.systems.vlmo.model import IMAGE, VLMo, VlmoConfig
from mmcore.systems.vlmo.shapes import vlmo_vision
from mmcore.weights.files import read_folder, read_json, read_weights, save_folder
from mmcore.weights.layout import Layout, leading, scalar, under
from mmcore.weights.pictures import with_pictures, write_pictures

KIND = "vlmo"
_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.q_bias": "attn.q_bias",
    "attn.v_bias": "attn.v_bias",
    "attn.out": "attn.proj",
    "scale1": "gamma_1",
    "scale2": "gamma_2",
}
_BLOCK |= {f"norms.{i}": f"norm2_{name}" for i, name in enumerate(("text", "imag", "vl"))}
_BLOCK |= {f"mlps.{i}": f"mlp_{name}" for i, name in enumerate(("text", "imag", "vl"))}
_TEXT = {name: theirs for name, theirs in ENCODER.items() if not name.startswith("blocks.")}
_INDICES = ("relative_position_index", "text_relative_position_index", "text_imag_relative_position_index")
_PLACES = "text_embeddings.position_embeddings"
LAYOUT = Layout(
    {
        "image_embed.class_embedding": leading("transformer.cls_token", 2),
        "image_embed.position_embedding": leading("transformer.pos_embed", 1),
        "image_embed.patch_embed": "transformer.patch_embed.proj",
        **{f"text_embed.{name}": (x if isinstance(x, str) else x.name).replace("embeddings.", "text_embeddings.", 1)
           for name, x in _TEXT.items()},
        "{text_embed,image_embed}.modality": "token_type_embeddings.weight",
        **under("blocks.{i}", "transformer.blocks.{i}", _BLOCK),
        "norm": "transformer.norm",
        "relative.table": "relative_position_bias_table",
        "pooler": "pooler.dense",
        **under("text_head", "mlm_score", {**HEAD, "weight": "decoder.weight"}),
        "match_head": "itm_score.fc",
        "image_proj": "itc_image_proj.fc",
        "text_proj": "itc_text_proj.fc",
        "image_joint_proj": "itc_vl_image_proj.fc",
        "text_joint_proj": "itc_vl_text_proj.fc",
        "logit_scale": scalar("logit_scale"),
        "logit_scale_joint": scalar("logit_vl_scale"),
        **{f"answer_head.{name}": f"vqa_classifier.{i}" for name, i in (("fc1", 0), ("norm", 1), ("fc2", 3))},
    },
    unread=(*_INDICES, "text_embeddings.position_ids"),
    older=(("module.", ""),),
    what="a file of VLMo's",
)  # fmt: skip


def is_vlmo(path: Path) -> bool:
    """Whether a path is a file of torch's, or a folder of ours with a VLMo."""
    if path.is_file():
        return path.suffix in (".pt", ".pth", ".ckpt", ".bin")
    return (path / "config.json").is_file() and read_json("vlmo", path / "config.json").get("model_type") == KIND


def load_vlmo(path: Path | str, *, dtype: torch.dtype | None = None) -> VLMo:
    """The model in a published file, such as vlmo_base_patch16_224.pt, or in a folder that `save_vlmo` wrote, float32
    on the CPU, whatever `dtype` is; a ValueError of a damaged file, missing or unknown names, wrong shapes. What a file
    has not, such as the experts of both and the heads before the last stage, stays random."""
    op, path = "load_vlmo", Path(path)
    is_folder, unread = path.is_dir(), ()
    if is_folder:
        raw = read_json(op, path / "config.json")
        require(op, raw.get("model_type") == KIND, "config.json must be of a vlmo, got {}", raw.get("model_type"))
        config = from_json(VlmoConfig, raw)
        config = replace(config, vision=with_pictures(op, path, config.vision))
        state = read_folder(op, path)
    else:
        state = LAYOUT.renamed(read_weights(op, path))
        config = _shape(op, state)
        # which a model with a table of distances has, and does not use
        unread = (_PLACES, "nlvr2_classifier") if config.vision.positions == "none" else ("nlvr2_classifier",)
    with torch.device("meta" if is_folder else "cpu"):
        model = VLMo(config)
    wanted = model.state_dict()
    if not is_folder:
        pairs = list(LAYOUT.pairs(wanted))
        absent = [
            name
            for pair in pairs
            if not pair.ours[0].startswith(_LATER) and not _is_joint(pair.ours[0])
            for name in pair.theirs
            if name not in state
        ]
        require(
            op, not absent, "{} must hold every weight of the model, missing {}", LAYOUT.what, ", ".join(absent[:3])
        )
        there = {name for pair in pairs if all(n in state for n in pair.theirs) for name in pair.ours}
        wanted = {name: x for name, x in wanted.items() if name in there}
    model.load_state_dict(LAYOUT.read(op, state, wanted, unread=unread), assign=True, strict=is_folder)
    return model


_LATER = ("pooler", "match_head", "image_proj", "text_proj", "image_joint", "text_joint", "logit_scale", "text_head")
_LATER += ("answer_head",)
"""Heads that a file has by the stage that it is of."""


def _is_joint(name: str) -> bool:
    return name.startswith("blocks.") and name.split(".")[2] in ("norms", "mlps") and name.split(".")[3] == "2"


def _shape(op: str, state: Mapping[str, Tensor]) -> VlmoConfig:
    """As the tensors' shapes tell; heads have 64 channels, but the 16 of base-plus 34."""
    needed = ("transformer.cls_token", "transformer.patch_embed.proj.weight", "text_embeddings.word_embeddings.weight")
    missing = [name for name in needed if name not in state]
    require(op, not missing, "{} must hold its embeddings, missing {}", LAYOUT.what, missing)
    width, patch = state[needed[0]].shape[-1], state[needed[1]].shape[-1]
    blocks = "transformer.blocks."
    num = 1 + max(int(name.split(".")[2]) for name in state if name.startswith(blocks))
    joint = {int(name.split(".")[2]) for name in state if name.startswith(blocks) and ".mlp_vl." in name}
    table, positions = state.get("relative_position_bias_table"), state.get("transformer.pos_embed")
    has_table, distances = table is not None, VlmoConfig.num_distances
    require(op, has_table or positions is not None, "{} must hold positions, got none", LAYOUT.what)
    if table is not None:
        heads, span = table.shape[1] // num, math.isqrt(max(0, len(table) - 5 - 2 * distances))
        fits = span**2 == len(table) - 5 - 2 * distances and span % 2 == 1
        require(
            op,
            fits,
            "{} must hold distances of a square and of {} words, got {} rows",
            LAYOUT.what,
            distances,
            len(table),
        )
        side = (span + 1) // 2
    else:
        assert positions is not None
        heads, side = 16 if width == 544 else max(1, width // 64), math.isqrt(positions.shape[1] - 1)
    answers = state.get("vqa_classifier.3.weight")
    vision = vlmo_vision(
        side * patch,
        patch,
        width,
        num,
        heads,
        len(state[f"{blocks}0.mlp_imag.fc1.weight"]),
        relative_positions="layers" if has_table else "none",
        positions="none" if positions is None else "learned",
        layer_scale=0.1 if f"{blocks}0.gamma_1" in state else None,
    )
    return VlmoConfig(
        vision,
        len(state[needed[2]]),
        num_text=len(state[f"{_PLACES}.weight"]) if f"{_PLACES}.weight" in state else 40,
        num_joint=len(joint) or (3 if num > 12 else 2),
        num_answers=0 if answers is None else len(answers),
    )


def save_vlmo(model: VLMo, folder: Path | str) -> None:
    """Writes a new folder whose model.safetensors has the weights by the published names."""
    config, preprocess = {"model_type": KIND, **asdict(model.config)}, model.config.vision.preprocess
    save_folder("save_vlmo", folder, config, LAYOUT.write(model.state_dict()), lambda x: write_pictures(x, preprocess))


def of_tower(tower: Tower, config: VlmoConfig) -> dict[str, Tensor]:
    """Weights of a ViT as BEiT trains it, for a VLMo of the same shape: its feed-forwards are the experts of images."""
    found, vision = {}, config.vision
    for name, x in tower.state.items():
        part, _, rest = name.partition(".")
        if part == "transformer":
            _, i, of_block = rest.split(".", 2)
            for theirs, ours in (("norm2", "norms"), ("mlp", "mlps")):
                if of_block.startswith(f"{theirs}."):
                    of_block = f"{ours}.{IMAGE}{of_block.removeprefix(theirs)}"
            found[f"blocks.{i}.{of_block}"] = x
        elif part == "norm_post":
            found[f"norm.{rest}"] = x
        elif part != "relative":
            found[f"image_embed.{name}"] = x
    tables = [found.pop(f"blocks.{i}.relative.table", None) for i in range(vision.num_layers)]
    if "relative.table" in tower.state:
        tables = [tower.state["relative.table"]] * vision.num_layers
    if vision.relative_positions == "layers":
        known = torch.cat([x for x in tables if x is not None], 1)
        rows = 2 * config.num_distances + 2  # of what words have
        found["relative.table"] = torch.cat([known, known.new_zeros(rows, known.shape[1])])
    found["image_embed.modality"] = torch.zeros(1, vision.width)  # the tower has none
    return fitted_state(found, tower.config.image_size // tower.config.patch_size, config)


def fitted_state(state: Mapping[str, Tensor], side: int, config: VlmoConfig) -> dict[str, Tensor]:
    """Weights of a VLMo with `side` patches a side, for another size of images and fewer places of words."""
    vision, found = config.vision, dict(state)
    for name, x in state.items():
        if name == "relative.table":
            found[name] = resized_distances(x, side, vision.image_size // vision.patch_size)
        elif name == "image_embed.position_embedding":
            found[name] = interpolate_positions(x, vision.num_patches, num_prefix=1, antialias=False)
        elif name == "text_embed.position_embedding":
            found[name] = x[: config.num_text]
    return found
