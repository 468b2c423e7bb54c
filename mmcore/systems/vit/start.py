"""What a classifier's tower starts from: a shape, or another run's or folder's tower at the size that is asked for."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from mmcore.nn import interpolate_positions
from mmcore.ops import require
from mmcore.parts.image_tower import PooledTower
from mmcore.parts.towers import load_pooled
from mmcore.parts.vit import VisionConfig


def given_tower(where: str, image_size: int | None, drop_path: float) -> PooledTower:
    """A tower to be fine-tuned: its positions are learned, whatever they were, and carried over to `image_size` (None =
    its own), there is no mask token; a ValueError where it is no ViT of ours."""
    given = load_pooled(where)
    what = "--vision must be a ViT that runs on our attention, got {}"
    require("vit", isinstance(given.config, VisionConfig), what, given.config.summary)
    assert isinstance(given.config, VisionConfig)
    options: dict[str, Any] = {"has_final_norm": True, "has_mask_token": False, "drop_path": drop_path}
    if given.config.positions == "sincos":
        options["positions"] = "learned"
    config = resized(replace(given.config, **options, drop_path_uniform=False), image_size)
    state, name = {n: x for n, x in given.state.items() if n != "mask_token"}, "position_embedding"
    if name in state:
        prefix = int(config.has_class_token)
        state[name] = interpolate_positions(state[name], config.num_patches, num_prefix=prefix)
    return PooledTower(config, given.pool, state)


def resized(vision: VisionConfig, image_size: int | None) -> VisionConfig:
    """For images of another size, or its own; a ValueError where that is no multiple of the patches'."""
    if image_size is None:
        return vision
    patch = vision.patch_size
    fits = image_size >= patch and image_size % patch == 0
    require("vit", fits, "--image-size must be a multiple of the patches' {} pixels, got {}", patch, image_size)
    return replace(vision, image_size=image_size, has_margin=False)


def named_for(given: PooledTower, pool: str) -> dict[str, Tensor]:
    """A tower's weights by their names in a classifier that reads it so: SigLIP's head is of that pool alone."""
    return {f"visual.{name}": x for name, x in given.state.items() if pool == "head" or not name.startswith("head.")}
