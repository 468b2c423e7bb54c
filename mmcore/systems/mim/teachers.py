"""Image towers that do not learn, whose features of patches are predicted."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.data import Preprocess
from mmcore.ops import require
from mmcore.parts.image_tower import ImagePool, ImageTower, PooledTower
from mmcore.parts.towers import tower_owner
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.settings import from_json


@dataclass(frozen=True)
class TeacherConfig:
    """Shape of the tower; `embed_dim` is that of its projection, None = it has none."""

    vision: VisionConfig
    embed_dim: int | None = None
    pool: ImagePool = "class"

    @property
    def side(self) -> int:
        """Patches of a side."""
        return self.vision.image_size // self.vision.patch_size

    @property
    def width(self) -> int:
        """Of the features."""
        return self.vision.width if self.embed_dim is None else self.embed_dim


class Teacher(nn.Module):
    """What an image tower makes of patches, behind its final norm and its projection, where it has them: of a CLIP what
    its class token becomes an embedding by."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = ImageTower(config.vision, config.embed_dim, config.pool)

    @property
    def preprocess(self) -> Preprocess:
        """What images have to be like."""
        return self.config.vision.preprocess

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to [B, P, E]."""
        states = ViT.forward(self.tower, images)[:, self.config.vision.num_prefix :]
        return states if self.tower.proj is None else self.tower.proj(states)


def load_teacher(op: str, path: Path | None, side: int) -> tuple[TeacherConfig, dict[str, Tensor]]:
    """Shape and weights of the tower of a run or a folder (see `load_tower`), whole; a ValueError of anything else, and
    of another grid of patches than `side` by `side`."""
    require(op, path is not None, "--teacher must be given: a run with an image tower, or a folder, got {}", path)
    assert path is not None
    owner, inputs = tower_owner(path)
    whole: Any = (
        owner.pooled_tower(*inputs)
        if hasattr(owner, "pooled_tower")
        else PooledTower(owner.image_tower(*inputs).config, "mean", owner.image_tower(*inputs).state)
    )
    is_vit = isinstance(whole.config, VisionConfig)
    require(op, is_vit, "--teacher must be of a ViT, whose patches are predicted, got {}", path)
    model: Any = inputs[-1] if inputs else owner
    proj = getattr(getattr(model, "visual", None), "proj", None)
    config = TeacherConfig(whole.config, None if proj is None else proj.out_features, whole.pool)
    what = "--teacher must have the grid of {} x {} patches that --model has, got {} x {}"
    require(op, config.side == side, what, side, side, config.side, config.side)
    state = {f"tower.{name}": x for name, x in whole.state.items()}
    if proj is not None:
        state |= {f"tower.proj.{name}": x.detach() for name, x in proj.state_dict().items()}
    with torch.device("meta"):
        wanted = Teacher(config).state_dict()
    # what is read as it is has no norm behind its layers, and a mask token that is not used
    state = {name: x for name, x in state.items() if name in wanted}
    missing = sorted(wanted.keys() - state.keys())
    require(op, not missing, "--teacher must be a whole tower, missing {}", missing[:3])
    return config, state


def teacher_of(saved: Any, state: dict[str, Tensor]) -> Teacher:
    """The module of `load_teacher`'s settings, as JSON holds them, and weights; it does not learn."""
    with torch.device("meta"):
        teacher = Teacher(from_json(TeacherConfig, saved))
    teacher.load_state_dict(state, assign=True)
    return teacher.eval().requires_grad_(False)


def saved_teacher(config: TeacherConfig) -> dict[str, Any]:
    """As JSON holds it."""
    return asdict(config)
