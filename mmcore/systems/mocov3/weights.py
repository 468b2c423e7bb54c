"""MoCo v3's weights as they are published: torch files with the names of the original under DistributedDataParallel."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mmcore.ops import require
from mmcore.systems.mocov3.model import MoCoV3Model
from mmcore.systems.vit.shapes import vit_vision
from mmcore.systems.vit.two_views import TwoViewConfig
from mmcore.weights.files import read_pickle
from mmcore.weights.layout import Layout, leading, under

_TOWER = {
    "class_embedding": leading("cls_token", 2),
    "position_embedding": leading("pos_embed", 1),
    "patch_embed": "patch_embed.proj",
    "transformer.blocks.{i}.attn.out": "blocks.{i}.attn.proj",
    "transformer.blocks.{i}": "blocks.{i}",
    "norm_post": "norm",
}
_HEAD = {"layer1": "0", "bn1": "1", "layer2": "3", "bn2": "4", "layer3": "6", "bn3": "7"}
LAYOUT = Layout(
    under("visual", "base_encoder", _TOWER)
    | under("projector", "base_encoder.head", _HEAD)
    | under("predictor", "predictor", _HEAD),
    unread=("momentum_encoder",),
    older=(("module.", ""),),
    what="a file of MoCo v3",
)


def load_mocov3(file: Path | str, *, teacher: bool = False, num_heads: int = 12) -> MoCoV3Model:
    """Loads a published file, such as `vit-s-300ep.pth.tar`.

    Args:
        file: a torch file with a "state_dict".
        teacher: tower and projector are the momentum encoder's; the predictor is the only one that there is.
        num_heads: of the tower, which a file does not tell; every published one has 12.

    Returns:
        The model, in training mode, in float32 on the CPU.

    Raises:
        ValueError: no such file, a damaged one, one of a ResNet or of a ViT with convolutions before it, missing or
            unknown names, wrong shapes.
    """
    op = "load_mocov3"
    state = LAYOUT.renamed(read_pickle(op, Path(file)))
    is_vit = getattr(state.get("base_encoder.patch_embed.proj.weight"), "ndim", 0) == 4
    require(op, is_vit, "file must be of a ViT without a convolutional stem, got {}", file)
    if teacher:
        own = {n: x for n, x in state.items() if not n.startswith("base_encoder.")}
        state = {re.sub("^momentum_encoder", "base_encoder", name): x for name, x in own.items()}
    model = MoCoV3Model(_shape(op, state, num_heads))
    model.load_state_dict(LAYOUT.read(op, state, model.state_dict()))
    return model


def _shape(op: str, state: Mapping[str, Tensor], num_heads: int) -> TwoViewConfig:
    def sizes(name: str) -> list[int]:
        require(op, name in state, "{} must hold every weight of the model, missing {}", LAYOUT.what, name)
        return list(state[name].shape)

    def head(name: str) -> tuple[int, ...]:
        return tuple(sizes(f"{name}.{i}.weight")[0] for i in (0, 3, 6) if i < 6 or f"{name}.{i}.weight" in state)

    base = "base_encoder"
    width, _, patch, _ = sizes(f"{base}.patch_embed.proj.weight")
    side = math.isqrt(sizes(f"{base}.pos_embed")[1] - 1)
    mlp_dim, _ = sizes(f"{base}.blocks.0.mlp.fc1.weight")
    num_layers = len({name.split(".")[2] for name in state if name.startswith(f"{base}.blocks.")})
    vision = vit_vision(side * patch, patch, width, num_layers, num_heads, mlp_dim, positions="sincos")
    return TwoViewConfig(vision, head(f"{base}.head"), head("predictor"))
