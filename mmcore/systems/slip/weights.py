"""SLIP's published files, of SLIP and of the CLIP trained beside it (github.com/facebookresearch/SLIP): a timm ViT and
OpenAI's text tower in a pickle of a whole training state."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmcore.ops import require
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextConfig
from mmcore.systems.clip.names import OPEN_CLIP
from mmcore.systems.slip.model import SLIP
from mmcore.systems.vit.shapes import vit_vision
from mmcore.weights.files import read_pickle
from mmcore.weights.layout import Layout, leading, scalar, transposed, under

_BLOCK = {name: name for name in ("norm1", "attn.qkv", "norm2", "mlp.fc1", "mlp.fc2")} | {"attn.out": "attn.proj"}
LAYOUT = Layout(
    {
        "logit_scale": scalar("logit_scale"),
        "visual.class_embedding": leading("visual.cls_token", 2),
        "visual.patch_embed": "visual.patch_embed.proj",
        "visual.position_embedding": leading("visual.pos_embed", 1),
        **under("visual.transformer.blocks.{i}", "visual.blocks.{i}", _BLOCK),
        "visual.norm_post": "visual.norm",
        "visual.proj.weight": transposed("image_projection"),
        **{ours: theirs for ours, theirs in OPEN_CLIP.rows.items() if ours.startswith("text.")},
        "image_mlp": "image_mlp",
    },
    older=(("module.", ""),),
    what="a file of SLIP's",
)
# by width: the small tower is MoCo v3's, with as many heads as the base one
_HEADS = {384: 12, 768: 12, 1024: 16}
slip_vision = partial(vit_vision, has_final_norm=False, interpolation="bilinear")
"""`VisionConfig` with the options of the tower, whose final norm a CLIP has behind its pooling, and of pictures."""


def is_published(file: Path) -> bool:
    """Whether a file of torch's has the names of SLIP's; False of anything else, a ValueError of a damaged one."""
    return file.suffix in (".pt", ".pth") and "visual.cls_token" in _read("load_slip", file)


def load_slip(path: str | Path, *, config: CLIPConfig | None = None) -> CLIP:
    """The model in a published file, such as slip_base_100ep.pt: `SLIP`, or `CLIP` in files without its MLP.

    Args:
        path: the file; of what else it holds (an optimizer, arguments) nothing is kept.
        config: the shape, for another one than the published ViT-S/16, B/16 and L/16.

    Returns:
        The model, float32 on the CPU, in training mode.

    Raises:
        ValueError: a file that is damaged, missing or unknown names, wrong shapes, no text tower (SimCLR's), a width
            without `config` that none of the published has.
    """
    op, file = "load_slip", Path(path)
    state = _read(op, file)
    for name, what in (("visual.cls_token", "image"), ("token_embedding.weight", "text")):
        require(op, name in state, "{} must hold SLIP's {} tower, missing {}", file, what, name)
    shape = _shape(op, state) if config is None else config
    mlp = {name: x for name, x in state.items() if name.startswith("image_mlp.")}
    sizes = [len(mlp[name]) for name in ("image_mlp.layer1.weight", "image_mlp.layer3.weight") if name in mlp]
    with torch.device("meta"):
        model = SLIP(shape, *sizes) if len(sizes) == 2 else CLIP(shape)
    model.load_state_dict(LAYOUT.read(op, state, model.state_dict()), assign=True)
    return model


def _read(op: str, file: Path) -> dict[str, Tensor]:
    return LAYOUT.renamed(read_pickle(op, file))


def _shape(op: str, state: Mapping[str, Tensor]) -> CLIPConfig:
    """What the tensors' own shapes say, heads by the published widths; the names are known, not yet that all are
    there."""

    def size(name: str, axis: int) -> int:
        fits = name in state and state[name].ndim > axis
        require(op, fits, "{} must hold every weight of the model, missing {}", LAYOUT.what, name)
        return state[name].shape[axis]

    def depth(start: str) -> int:
        return len({name.removeprefix(start).split(".")[0] for name in state if name.startswith(start)})

    width, patch = size("visual.pos_embed", 2), size("visual.patch_embed.proj.weight", 3)
    what = "config must be given of a tower {} wide: published are {}"
    require(op, width in _HEADS, what, width, sorted(_HEADS))
    vision = slip_vision(
        image_size=patch * math.isqrt(size("visual.pos_embed", 1) - 1),
        patch_size=patch,
        width=width,
        num_layers=depth("visual.blocks."),
        num_heads=_HEADS[width],
        mlp_dim=size("visual.blocks.0.mlp.fc1.weight", 0),
    )
    words = size("token_embedding.weight", 1)
    text = TextConfig(
        vocab_size=size("token_embedding.weight", 0),
        context_length=size("positional_embedding", 0),
        width=words,
        num_layers=depth("transformer.resblocks."),
        num_heads=words // 64,
        mlp_dim=size("transformer.resblocks.0.mlp.c_fc.weight", 0),
        activation="quick_gelu",
    )
    return CLIPConfig(size("image_projection", 1), vision, text)
