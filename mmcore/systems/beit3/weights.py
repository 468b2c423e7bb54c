"""BEiT-3's weights by the names of its published files (unilm's beit3, on torchscale), both ways."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.nn import interpolate_positions
from mmcore.ops import require
from mmcore.settings import from_json
from mmcore.systems.beit3.model import BEiT3, Beit3Config, Head
from mmcore.systems.beit3.shapes import beit3_vision
from mmcore.weights.files import read_folder, read_json, read_weights, save_folder
from mmcore.weights.layout import Layout, Theirs, leading, scalar
from mmcore.weights.pictures import with_pictures, write_pictures

KIND = "beit3"
FIRST_PLACE = 2
"""Rows of a file's tables of positions that no token has, as in fairseq."""


def _places(name: str) -> Theirs:
    return Theirs(name, lambda x: F.pad(x, (0, 0, FIRST_PLACE, 0)), lambda x: x[FIRST_PLACE:])


def _layout(*, decoupled: bool) -> Layout:
    rows: dict[str, str | Theirs] = {
        "image_embed.patch_embed": "beit3.vision_embed.proj",
        "image_embed.class_embedding": leading("beit3.vision_embed.cls_token", 2),
        "image_embed.mask_token": leading("beit3.vision_embed.mask_token", 2),
        "image_embed.position_embedding": _places("beit3.encoder.embed_positions.A.weight"),
        "text_embed.word_embedding": "beit3.text_embed",
        "text_embed.position_embedding": _places("beit3.encoder.embed_positions.B.weight"),
        "text_head": "mlm_head",
        "code_head": "mim_head",
        "image_proj": "vision_head",
        "text_proj": "language_head",
        "logit_scale": scalar("logit_scale"),
        "pool_norm": "pooler.norm",
        "pooler": "pooler.dense",
        **{f"answer_head.{name}": f"head.{i}" for name, i in (("fc1", 0), ("norm", 1), ("fc2", 3))},
    }
    ours, theirs = "blocks.{i}", "beit3.encoder.layers.{i}"
    shared = {
        "norm1": "self_attn_layer_norm",
        "attn.qkv": "self_attn.{q,k,v}_proj",
        "attn.inner_norm": "self_attn.inner_attn_ln",
        "attn.out": "self_attn.out_proj",
    }
    for number, letter in enumerate("AB"):
        for name, of_file in shared.items() if decoupled else ():
            rows[f"{ours}.{name}.{number}"] = f"{theirs}.{of_file}.{letter}"
        rows[f"{ours}.norms.{number}"] = f"{theirs}.final_layer_norm.{letter}"
        for name, of_file in (("fc1", "fc1"), ("fc2", "fc2"), ("inner_norm", "ffn_layernorm")):
            rows[f"{ours}.mlps.{number}.{name}"] = f"{theirs}.ffn.{letter}.{of_file}"
        if decoupled:
            rows[f"norm.{number}"] = f"beit3.encoder.layer_norm.{letter}"
    if not decoupled:
        rows |= {f"{ours}.{name}": f"{theirs}.{of_file}" for name, of_file in shared.items()}
        rows["norm.0"] = "beit3.encoder.layer_norm"
    return Layout(rows, older=(("module.", ""),), what="a file of BEiT-3's")


LAYOUTS = {decoupled: _layout(decoupled=decoupled) for decoupled in (True, False)}
"""By whether the attention is one a modality."""


def is_beit3(path: Path) -> bool:
    """Whether a path is a file of torch's, or a folder of ours with a BEiT-3."""
    if path.is_file():
        return path.suffix in (".pt", ".pth", ".ckpt", ".bin")
    return (path / "config.json").is_file() and read_json("beit3", path / "config.json").get("model_type") == KIND


def load_beit3(path: Path | str, *, dtype: torch.dtype | None = None) -> BEiT3:
    """The model in a published file, such as beit3_base_patch16_224.pth, or in a folder that `save_beit3` wrote,
    float32 on the CPU, whatever `dtype` is; a ValueError of a damaged file, missing or unknown names, wrong shapes. The
    heads that pretraining has and a file has not stay random."""
    op, path = "load_beit3", Path(path)
    is_folder = path.is_dir()
    if is_folder:
        raw = read_json(op, path / "config.json")
        require(op, raw.get("model_type") == KIND, "config.json must be of a beit3, got {}", raw.get("model_type"))
        config = from_json(Beit3Config, raw)
        config = replace(config, vision=with_pictures(op, path, config.vision))
        state = read_folder(op, path)
    else:
        state = LAYOUTS[True].renamed(read_weights(op, path))
        config = _shape(op, state)
    layout = LAYOUTS[config.decoupled]
    with torch.device("meta" if is_folder else "cpu"):
        model = BEiT3(config)
    wanted = model.state_dict()
    if not is_folder and config.head == "pretraining":
        absent = [n for n in ("text_head", "code_head") if layout.write({f"{n}.bias": torch.zeros(1)}).keys() - state]
        wanted = {name: x for name, x in wanted.items() if name.partition(".")[0] not in absent}
    model.load_state_dict(layout.read(op, state, wanted), assign=True, strict=is_folder)
    return model


def _shape(op: str, state: Mapping[str, Tensor]) -> Beit3Config:
    """As the tensors' shapes tell; heads have 64 channels."""
    names = {"cls": "beit3.vision_embed.cls_token", "patch": "beit3.vision_embed.proj.weight"}
    names |= {"words": "beit3.text_embed.weight", "image": "beit3.encoder.embed_positions.A.weight"}
    names |= {"text": "beit3.encoder.embed_positions.B.weight", "mlp": "beit3.encoder.layers.0.ffn.A.fc1.weight"}
    missing = [name for name in names.values() if name not in state]
    require(op, not missing, "{} must hold its embeddings and layers, missing {}", LAYOUTS[True].what, missing)
    found = {short: state[name] for short, name in names.items()}
    width, patch = found["cls"].shape[-1], found["patch"].shape[-1]
    start = "beit3.encoder.layers."
    num = 1 + max(int(name.removeprefix(start).partition(".")[0]) for name in state if name.startswith(start))
    side = math.isqrt(len(found["image"]) - FIRST_PLACE - 1)
    codes, answers = state.get("mim_head.weight"), state.get("head.3.weight")
    known: dict[str, Head] = {"vision_head.weight": "retrieval", "head.3.weight": "answers"}
    if codes is None and "mlm_head.weight" in state:
        known["mlm_head.weight"] = "captioning"
    heads: list[Head] = [kind for name, kind in known.items() if name in state]
    head: Head = heads[0] if heads else "pretraining"
    return Beit3Config(
        beit3_vision(side * patch, patch, width, num, max(1, width // 64), len(found["mlp"])),
        len(found["words"]),
        num_text=len(found["text"]) - FIRST_PLACE,
        decoupled=f"{start}0.self_attn.q_proj.A.weight" in state,
        head=head,
        num_codes=Beit3Config.num_codes if codes is None else len(codes),
        num_answers=len(answers) if answers is not None and head == "answers" else 0,
    )


def save_beit3(model: BEiT3, folder: Path | str) -> None:
    """Writes a new folder whose model.safetensors has the weights by the published names."""
    config, preprocess = {"model_type": KIND, **asdict(model.config)}, model.config.vision.preprocess
    tensors = LAYOUTS[model.config.decoupled].write(model.state_dict())
    save_folder("save_beit3", folder, config, tensors, lambda staged: write_pictures(staged, preprocess))


def fitted_state(state: Mapping[str, Tensor], config: Beit3Config) -> dict[str, Tensor]:
    """Weights of a BEiT-3 for another size of images and fewer places of words."""
    found, image, text = dict(state), "image_embed.position_embedding", "text_embed.position_embedding"
    found[image] = interpolate_positions(state[image], config.vision.num_patches, num_prefix=1, antialias=False)
    found[text] = state[text][: config.num_text]
    return found
