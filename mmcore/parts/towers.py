"""Image towers for models that read one: of a run, or of a folder of another library."""

from pathlib import Path
from typing import Any

from torch import Tensor

from mmcore.parts.vit import Tower
from mmcore.runs import is_run, read_run
from mmcore.systems import entries
from mmcore.weights.files import read_json


def load_tower(path: Path) -> Tower:
    """Reads an image tower: of a run of a recipe whose model has one; of a folder of transformers of a system that is
    known here (safetensors), such as CLIP or BLIP-2; or of a folder or file of open_clip with a CLIP.

    Of a CLIP the last layer is left out, as LAVIS and LLaVA do: nothing trained what it makes of patches. A ValueError
    of anything else.
    """
    if is_run(path):
        trained = read_run(path)
        owner: Any = trained.recipe
        inputs, kind = (trained.assets, trained.model), trained.run.recipe
    else:
        config, known, towers = path / "config.json", entries("FOLDERS"), entries("TOWERS")
        kind = str(read_json("load_tower", config).get("model_type")) if config.is_file() else ""
        if kind in towers:
            return towers[kind].load()(path)
        if kind not in known and config.is_file() and not (path / "open_clip_config.json").is_file():
            wanted = f"a folder of a model of {', '.join(known)}, whole, or of open_clip"
            raise ValueError(f"--vision must be a run, or {wanted}, got {path}, which is of {kind}")
        owner, inputs = known[kind if kind in known else "clip"].load()(path), ()
    if not hasattr(owner, "image_tower"):
        raise ValueError(f"--vision must be of a model with an image tower, got {path}, which is of {kind}")
    return owner.image_tower(*inputs)


def visual_state(tower: Tower) -> dict[str, Tensor]:
    """A tower's weights by their names in a model that has it as `visual`."""
    return {f"visual.{name}": x for name, x in tower.state.items()}
