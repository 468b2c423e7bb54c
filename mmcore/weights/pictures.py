"""What a folder says of pictures: its image processor, read by transformers, held to our pixels, and written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.checkpoint import write_json
from mmcore.data.transforms.images import Interpolation, Preprocess, normalized
from mmcore.ops import require
from mmcore.weights.files import LOCAL, read_json

FILE = "preprocessor_config.json"
RULES = {"image_mean": "mean", "image_std": "std", "interpolation": "interpolation", "fit": "fit"}
"""Of a `VisionConfig`, what is said of pictures, and what it is called in a `Preprocess`."""
_INTERPOLATIONS: dict[Any, Interpolation] = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
_TYPES = {"crop": "CLIPImageProcessor", "squash": "ViTImageProcessor", "pad": "LlavaImageProcessor"}
_PROBES = ((61, 47), (40, 93))  # width and height

Views = Callable[[Preprocess, Image.Image], Tensor]
"""What a model sees of an RGB image: uint8 [V, 3, S, S]."""


def _whole(preprocess: Preprocess, image: Image.Image) -> Tensor:
    return preprocess([image])


def with_pictures(op: str, folder: Path, vision: Any, views: Views = _whole) -> Any:
    """A `VisionConfig` with what the folder's image processor, if it has one, does to a picture in place of what is
    usual for its kind; a ValueError where that is another size, or nothing that `views` can do, measured on pictures of
    odd sizes."""
    assumed, processor = vision.preprocess, _processor(op, folder)
    if processor is None:
        return vision
    try:
        found = _stated(op, folder, processor, assumed)
        # which keeps a picture's shape; its towers are read here for squares, see `vit_names.with_image_size`
        if not type(processor).__name__.startswith("Siglip2"):
            what = "{}/{} must be of {} pixels, as config.json has it, got {}"
            require(op, found.size == assumed.size, what, folder, FILE, assumed.size, found.size)
            _measure(op, folder, processor, found, views)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # ours, or transformers' own
        why = str(error).splitlines()[0]
        if why.startswith(f"{op}: "):
            raise
        raise ValueError(
            f"{op}: {folder}/{FILE} must tell how a picture becomes a square of RGB, got: {why}"
        ) from error
    return replace(vision, **{ours: getattr(found, name) for ours, name in RULES.items()})


def _processor(op: str, folder: Path) -> Any | None:
    beside = folder / "processor_config.json"
    has_one = (folder / FILE).is_file() or (beside.is_file() and "image_processor" in read_json(op, beside))
    if not has_one:
        return None
    from transformers import AutoImageProcessor  # noqa: PLC0415 (seconds, where a folder has pictures' settings alone)

    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", **LOCAL)
    except Exception as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{op}: {folder}/{FILE} must be one that transformers reads, got: {why}") from error


def _stated(op: str, folder: Path, processor: Any, assumed: Preprocess) -> Preprocess:
    """As its settings read."""

    def of(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    is_crop, is_padded, size = of("do_center_crop"), of("do_pad"), of("size", {})
    if type(processor).__name__.startswith("Siglip2"):
        side, fit = assumed.size, assumed.fit
    else:
        side = of("crop_size", {})["height"] if is_crop else size["height"] or size["shortest_edge"]
        fit = "pad" if is_padded else "crop" if is_crop else "squash"
    numbers = {"mean": of("image_mean"), "std": of("image_std")}
    if not of("do_normalize") or None in numbers.values():
        numbers = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    numbers = {n: tuple(map(float, x if isinstance(x, list | tuple) else [x] * 3)) for n, x in numbers.items()}
    resample = of("resample")
    what = "{}/{} must resize by bilinear or bicubic interpolation, got {}"
    require(op, resample in _INTERPOLATIONS and of("do_resize"), what, folder, FILE, resample)
    return Preprocess(int(side), interpolation=_INTERPOLATIONS[resample], fit=fit, **numbers)


def _measure(op: str, folder: Path, processor: Any, found: Preprocess, views: Views) -> None:
    for width, height in _PROBES:
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        ours = normalized(views(found, image), found.mean, found.std)
        theirs = torch.as_tensor(processor(image, return_tensors="pt").pixel_values)  # of tiles [1, V, 3, S, S]
        theirs = theirs.flatten(0, max(0, theirs.ndim - 4)).float()
        same = theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=0, atol=1e-5)
        what = "{}/{} must make of a picture what mmcore can ({}), got other pixels from its {}"
        require(op, same, what, folder, FILE, found.summary, type(processor).__name__)


def processor_settings(preprocess: Preprocess) -> dict[str, Any]:
    """The same for transformers."""
    square = {"height": preprocess.size, "width": preprocess.size}
    is_squash = preprocess.fit == "squash"
    crop = {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": preprocess.size}}
    return {
        "image_processor_type": _TYPES[preprocess.fit],
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": int(preprocess.resample),
        **({"size": square} if is_squash else crop),
        **({"do_pad": True} if preprocess.fit == "pad" else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def write_pictures(folder: Path, preprocess: Preprocess) -> None:
    """Writes preprocessor_config.json."""
    write_json(folder / FILE, processor_settings(preprocess))
