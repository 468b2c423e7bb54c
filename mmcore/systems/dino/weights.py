"""DINO's and iBOT's checkpoints as published, tower and head."""

from pathlib import Path

import torch

from mmcore.ops import require
from mmcore.parts.published_vit import TIMM_TOWER, published_config, read_published
from mmcore.systems.dino.model import DINOConfig, DINOModel
from mmcore.weights.layout import Layout

_PARAMETRIZED = "parametrizations.weight.original"
LAYOUT = Layout(
    {
        **{f"visual.{name}": theirs for name, theirs in TIMM_TOWER.items()},
        "head.mlp": "head.mlp",
        "head.last_layer.g": "head.last_layer.weight_g",
        "head.last_layer.v": "head.last_layer.weight_v",
    },
    # torch's newer form of weight normalisation
    older=tuple((f"head.last_layer.{_PARAMETRIZED}{i}", f"head.last_layer.weight_{x}") for i, x in enumerate("gv")),
    what="a published checkpoint",
)


def load_dino(file: Path | str, part: str = "teacher") -> DINOModel:
    """The teacher, or the student, of a published checkpoint of DINO, or of iBOT with one head for both, whose norms
    learn where they are not all 1; a ValueError of other files, and of a tower alone, which --vision takes."""
    op, file = "load_dino", Path(file)
    require(op, part in ("teacher", "student"), "part must be teacher or student, got {!r}", part)
    state = read_published(file, part)
    require(op, state is not None, "{} must be a checkpoint of DINO or iBOT, got other names", file)
    assert state is not None
    state = LAYOUT.renamed(state)
    sizes = [state.get(f"head.{name}") for name in ("mlp.0.weight", "mlp.4.weight", "last_layer.weight_v")]
    require(op, all(x is not None for x in sizes), "{} must have a head of three layers, got none", file)
    hidden, bottleneck, count = (len(x) for x in sizes if x is not None)
    learns = not bool((state["head.last_layer.weight_g"] == 1).all())
    config = DINOConfig(published_config(state), hidden, bottleneck, count, learns_norm=learns, init_std=None)
    with torch.device("meta"):
        model = DINOModel(config)
    # iBOT's checkpoints have the last layer twice where it is of both
    model.load_state_dict(LAYOUT.read(op, state, model.state_dict(), unread=("head.last_layer2",)), assign=True)
    return model
