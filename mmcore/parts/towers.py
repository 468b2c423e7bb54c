"""Image towers for models that read one: of a run, or of a folder of another library."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmcore.parts import vit_names
from mmcore.parts.foreign import TIMM, load_foreign_vision, load_timm
from mmcore.parts.image_tower import ImagePool, ImageTower, PooledTower
from mmcore.parts.published_vit import published_vit
from mmcore.parts.timm_vit import is_timm, load_timm_vit
from mmcore.parts.vit import Tower, VisionConfig, mae_vision, siglip_vision
from mmcore.runs import is_run, read_run
from mmcore.systems import entries
from mmcore.weights.files import read_folder, read_json, read_weights
from mmcore.weights.layout import Layout, Rows
from mmcore.weights.pictures import with_pictures
from mmcore.weights.settings import Key, Settings

_WEIGHTS_FILES = (".pth", ".pt", ".tar", ".bin", ".safetensors")


def load_tower(path: Path) -> Tower:
    """Reads an image tower: of a run of a recipe whose model has one; of a folder of transformers of a system that is
    known here (safetensors), such as CLIP or BLIP-2; of a file as its authors published it, such as of MAE, BEiT, DINO,
    iBOT or DINOv2; of a folder or file of timm with a ViT; or of a folder or file of open_clip with a CLIP.

    Of a CLIP the last layer is left out, as LAVIS and LLaVA do: nothing trained what it makes of patches. A ValueError
    of anything else.
    """
    owner, inputs = tower_owner(path)
    return owner.image_tower(*inputs)


def _of_open_clip(folder: Path) -> str:
    """Of open_clip's settings the part by which a system knows them as its own; "" = they are a CLIP's."""
    file = folder / "open_clip_config.json"
    parts = read_json("load_tower", file).get("model_cfg") if file.is_file() else None
    return next((name for name in parts or () if name in entries("FOLDERS")), "")


class _Read(NamedTuple):
    """A tower that is read without the rest of its model."""

    tower: Tower

    def image_tower(self) -> Tower:
        return self.tower


def tower_owner(path: Path) -> tuple[Any, tuple[Any, ...]]:
    """What has `image_tower`, a recipe or a model, and what that is called with; errors as of `load_tower`."""
    if is_run(path):
        trained = read_run(path)
        owner: Any = trained.recipe
        inputs, kind = (trained.assets, trained.model), trained.run.recipe
    elif (found := _of_file(path)) is not None:
        assert isinstance(found.config, VisionConfig)
        return _Read(Tower(found.config, found.state)), ()
    else:
        config, known, towers = path / "config.json", entries("FOLDERS"), entries("TOWERS")
        kind = str(read_json("load_tower", config).get("model_type")) if config.is_file() else _of_open_clip(path)
        if kind in towers:
            return _Read(towers[kind].load()(path)), ()
        if kind not in known and config.is_file() and not (path / "open_clip_config.json").is_file():
            wanted = f"a folder of a model of {', '.join(known)}, whole, or of open_clip"
            raise ValueError(f"--vision must be a run, or {wanted}, got {path}, which is of {kind}")
        owner, inputs = known[kind if kind in known else "clip"].load()(path), ()
    if not hasattr(owner, "image_tower"):
        raise ValueError(f"--vision must be of a model with an image tower, got {path}, which is of {kind}")
    return owner, inputs


def _of_file(path: Path) -> PooledTower | None:
    """Of a file of weights alone, or a folder of timm's: read once, and taken by the first system that knows it, as
    timm's, or as those that are published by timm's names; None of others."""
    if is_timm(path):
        return load_timm_vit(path)
    if not path.is_file() or path.suffix not in _WEIGHTS_FILES:
        return None
    state = read_weights("load_tower", path)
    towers = (entry.load()(state) for entry in entries("FILES").values())
    if (tower := next((tower for tower in towers if tower is not None), None)) is not None:
        return PooledTower(tower.config, "mean", tower.state)
    if is_timm(path, state):
        return load_timm_vit(path, state)
    tower = published_vit(state)
    return None if tower is None else PooledTower(tower.config, "class", tower.state)


def visual_state(tower: Tower) -> dict[str, Tensor]:
    """A tower's weights by their names in a model that has it as `visual`."""
    return {f"visual.{name}": x for name, x in tower.state.items()}


_CLIP = {**vit_names.CLIP_TOWER, "norm_post": "post_layernorm"}
_vit = partial(mae_vision, positions="learned", image_mean=(0.5,) * 3, image_std=(0.5,) * 3, fit="squash")
_UNREAD = ("pooler", "classifier", "visual_projection", "embeddings.position_ids")


class _Kind(NamedTuple):
    """A model type of transformers whose image tower is a ViT of ours."""

    names: Rows
    keys: Mapping[str, Key]
    config: Callable[..., VisionConfig]
    pool: ImagePool
    prefix: str = "vision_model."  # before the names in files of some classes


_KINDS = {
    "vit": _Kind(vit_names.VIT_TOWER, vit_names.VIT_SETTINGS, _vit, "class", "vit."),
    "clip_vision_model": _Kind(_CLIP, vit_names.CLIP_TOWER_SETTINGS, VisionConfig, "class"),
    "siglip_vision_model": _Kind(vit_names.SIGLIP_TOWER, vit_names.SIGLIP_TOWER_SETTINGS, siglip_vision, "head"),
}
_MUST = {"qkv_bias": True, "num_channels": 3, "vision_use_head": True}


def load_pooled(where: str | Path) -> PooledTower:
    """Reads an image tower that gives a vector an image, and how it does:

    - of a run whose recipe has one: a CLIP's whole tower at its class token, SigLIP's with its head, MAE's encoder as
      the mean of its patches, which is what its decoder reads;
    - of a folder of transformers (safetensors) or open_clip: CLIP, SigLIP, ViT and others that a ViT of ours is, on our
      attention; another vision model of transformers as it is there;
    - of a file of DINO, iBOT or DINOv2 as published, at its class token;
    - of a folder or file of timm with a ViT (`load_timm_vit`);
    - `timm:NAME`, as it is in timm, of random weights, or `timm:NAME@FILE.safetensors`.

    A ValueError of anything else.
    """
    if str(where).startswith(TIMM):
        config, state = load_timm(str(where))
        return PooledTower(config, "class", state)
    path = Path(where)
    if (found := _of_file(path)) is not None:
        return found
    kind, config = "", path / "config.json"
    if not is_run(path) and config.is_file() and not (path / "open_clip_config.json").is_file():
        kind = str(read_json("load_vision", config).get("model_type"))
    if kind in _KINDS:
        return _of_kind(path, _KINDS[kind])
    if kind and kind not in {**entries("FOLDERS"), **entries("TOWERS")}:
        foreign, state = load_foreign_vision(path)
        return PooledTower(foreign, "class", state)
    owner, inputs = tower_owner(path)
    if hasattr(owner, "pooled_tower"):
        return owner.pooled_tower(*inputs)
    tower = owner.image_tower(*inputs)
    return PooledTower(tower.config, "mean", tower.state)


def _of_kind(folder: Path, kind: _Kind) -> PooledTower:
    op, keys = "load_vision", {f"vision.{n}": key for n, key in kind.keys.items()}
    settings = Settings(keys, kinds={"vision": kind.config}, must=_MUST)
    config = with_pictures(op, folder, settings.read(op, read_json(op, folder / "config.json"))["vision"])
    with torch.device("meta"):
        wanted = ImageTower(config, None, kind.pool).state_dict()
    layout = Layout(kind.names, unread=_UNREAD, older=((kind.prefix, ""),))
    return PooledTower(config, kind.pool, layout.read(op, read_folder(op, folder), wanted))
