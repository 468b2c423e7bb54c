"""Image towers for models that read one: of a run, or of a folder of another library."""

from pathlib import Path

from mmcore.parts.vit import Tower
from mmcore.runs import is_run, read_run
from mmcore.systems import entries
from mmcore.weights.files import read_json


def load_tower(path: Path) -> Tower:
    """Reads an image tower.

    Of a CLIP the last layer is left out, as LAVIS and LLaVA do: nothing trained what it makes of patches.

    Args:
        path: a run of a recipe whose model has a tower; a folder of transformers of a system that is known here
            (safetensors), such as CLIP or BLIP-2; or a folder or file of open_clip with a CLIP.

    Raises:
        ValueError: nothing of this kind.
    """
    if is_run(path):
        trained = read_run(path)
        if not hasattr(trained.recipe, "image_tower"):
            raise ValueError(
                f"--vision must be of a model with an image tower, got {path}, which is of {trained.run.recipe}"
            )
        return trained.recipe.image_tower(trained.assets, trained.model)  # pyright: ignore[reportAttributeAccessIssue]
    config, known = path / "config.json", entries("FOLDERS")
    kind = str(read_json("load_tower", config).get("model_type")) if config.is_file() else ""
    towers = entries("TOWERS")
    if kind in towers:
        return towers[kind].load()(path)
    model = known[kind if kind in known else "clip"].load()(path)
    if not hasattr(model, "image_tower"):
        raise ValueError(f"--vision must be of a model with an image tower, got {path}, which is of {kind}")
    return model.image_tower()
