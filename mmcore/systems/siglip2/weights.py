"""SigLIP 2's weights, settings and image processor as transformers has them: Siglip2Model's, of images of any shape."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mmcore.checkpoint import write_json
from mmcore.systems.siglip import weights as siglip
from mmcore.systems.siglip.model import SigLIPConfig
from mmcore.systems.siglip2.model import SigLIP2, Siglip2Config
from mmcore.weights.files import read_json, save_folder
from mmcore.weights.folder import ModelFolder
from mmcore.weights.layout import Theirs
from mmcore.weights.pictures import FILE
from mmcore.weights.settings import Key

TRAINING_ONLY = ("decoder.", "distiller.")


def _as_rows(x: Tensor) -> Tensor:
    """Weights [D, 3, P, P] for patches as rows of (row, column, colour)."""
    return x.permute(0, 2, 3, 1).flatten(1)


_PATCHES = siglip.LAYOUT.rows["visual.patch_embed.weight"]
assert isinstance(_PATCHES, Theirs)
LAYOUT = replace(
    siglip.LAYOUT, rows={**siglip.LAYOUT.rows, "visual.patch_embed.weight": _PATCHES._replace(write=_as_rows)}
)
_SIZE = Key("vision_config.image_size", 256, write=lambda *_: ...)  # of a file's number of patches
SETTINGS = replace(
    siglip.SETTINGS,
    keys={**siglip.SETTINGS.keys, "vision.image_size": _SIZE},
    model_types=("siglip2",),
    written={
        **siglip.SETTINGS.written,
        "architectures": ["Siglip2Model"],
        "model_type": "siglip2",
        "vision_config.model_type": "siglip2_vision_model",
        "vision_config.num_patches": lambda ours: (ours["vision.image_size"] // ours["vision.patch_size"]) ** 2,
        "text_config.model_type": "siglip2_text_model",
    },
    plain=lambda config: SigLIPConfig(config.vision, config.text),
)


def _model(config: SigLIPConfig) -> SigLIP2:
    return SigLIP2(Siglip2Config(config.vision, config.text, config.vision.num_patches))


FOLDER = ModelFolder("siglip2", _model, SETTINGS, LAYOUT)


def load_siglip2(folder: Path | str) -> SigLIP2:
    """The model in a folder, without a decoder, in training mode, float32 on the CPU; of images as its image processor
    has them. Errors as of `ModelFolder.load`."""
    model: SigLIP2 = FOLDER.load(folder)
    file = Path(folder) / FILE
    if file.is_file():
        most = read_json("load_siglip2", file).get("max_num_patches", model.config.max_patches)
        model.config = replace(model.config, max_patches=most)
    return model


def save_siglip2(model: SigLIP2, folder: Path | str) -> None:
    """Writes a new folder that transformers' Siglip2Model and its image processor load, without what they
    have not, `TRAINING_ONLY`; errors as of `ModelFolder.save`."""
    op, config = "save_siglip2", model.config
    state = {n: x for n, x in model.state_dict().items() if not n.startswith(TRAINING_ONLY)}
    preprocess = config.preprocess
    processor: dict[str, Any] = {
        "image_processor_type": "Siglip2ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": int(preprocess.resample),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "patch_size": preprocess.patch_size,
        "max_num_patches": preprocess.max_patches,
    }
    written = SETTINGS.write(op, config), LAYOUT.write(state)
    save_folder(op, Path(folder), *written, lambda staged: write_json(staged / FILE, processor))
