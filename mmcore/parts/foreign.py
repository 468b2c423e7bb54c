"""Towers of other libraries as they are: an image module of transformers or timm, a text encoder of transformers."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcore.data.transforms.images import IMAGE_MEAN, IMAGE_STD, Fit, Interpolation, Preprocess, normalized
from mmcore.nn import BatchNorm, Linear
from mmcore.ops import require
from mmcore.weights.files import LOCAL, read_json, read_safetensors
from mmcore.weights.pictures import FILE, with_pictures

TIMM = "timm:"
_UNUSED = ("dtype", "architectures", "_name_or_path", "transformers_version", "id2label", "label2id")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class ForeignVision:
    """An image module that is built anew by `settings`, without dropout: of transformers those of its config.json, of
    timm the arguments of create_model. Its pooled features are `width` wide; the last six are of `Preprocess`."""

    library: Literal["transformers", "timm"]
    settings: dict[str, Any]
    width: int = 1
    image_size: int = 224
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD
    interpolation: Interpolation = "bicubic"
    fit: Fit = "crop"

    @property
    def preprocess(self) -> Preprocess:
        """What it wants of an image."""
        mean, std = tuple(self.image_mean), tuple(self.image_std)
        return Preprocess(self.image_size, mean, std, self.interpolation, self.fit)

    @property
    def name(self) -> str:
        """Of the module, in its library."""
        kind = self.settings.get("model_type") or self.settings.get("model_name")
        return f"{kind} of {self.library}"

    @property
    def summary(self) -> str:
        """For the reader."""
        return f"{self.name}, {self.width} features"


@dataclass(frozen=True)
class ForeignText:
    """A text encoder of transformers that is built anew by the `settings` of its config.json, without dropout."""

    settings: dict[str, Any]
    width: int
    vocab_size: int
    context_length: int
    pad_token_id: int

    @property
    def name(self) -> str:
        """Of the module."""
        return f"{self.settings.get('model_type')} of transformers"

    @property
    def summary(self) -> str:
        """For the reader."""
        return f"{self.name}, {self.vocab_size} tokens, {self.context_length} a caption, {self.width} features"


class ForeignImageTower(nn.Module):
    """A module as its library has it, and a projection: images to embeddings [B, E], not yet normalised. Statistics of
    its BatchNorms are of all ranks."""

    def __init__(self, config: ForeignVision, embed_dim: int | None) -> None:
        super().__init__()
        self.config, self.body = config, _image_module(config)
        self.proj = None if embed_dim is None else projection(config.width, embed_dim)

    def features(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """uint8 [B, 3, S, S], or floating point where they are normalised already, to pooled features [B, width]."""
        require("ForeignImageTower", kept is None, "kept must be None, got patches of a {}", self.config.name)
        if images.dtype == torch.uint8:
            images = normalized(images, self.config.image_mean, self.config.image_std)
        dtype = next(self.body.parameters()).dtype
        return _pooled(self.body(images.to(dtype)))


class ForeignTextTower(nn.Module):
    """A text encoder as transformers has it, the mean of the states that are no padding, and a projection."""

    def __init__(self, config: ForeignText, embed_dim: int) -> None:
        super().__init__()
        self.config, self.body = config, _transformers_module(config.settings)
        self.proj = projection(config.width, embed_dim)

    def forward(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """int64 [B, T] to [B, E]; as `BertTower`."""
        if lengths is not None and len(lengths):
            tokens = tokens[:, : max(lengths)]
        seen = tokens != self.config.pad_token_id
        x = self.body(input_ids=tokens, attention_mask=seen.long()).last_hidden_state
        seen = seen[..., None].to(x.dtype)
        return self.proj((x * seen).sum(1) / seen.sum(1).clamp_min(1))


def projection(width: int, embed_dim: int) -> Linear:
    """A new one, without bias."""
    proj = Linear(width, embed_dim, bias=False)
    nn.init.normal_(proj.weight, std=width**-0.5)
    return proj


def load_timm(name: str) -> tuple[ForeignVision, dict[str, Tensor]]:
    """The module that `timm:NAME` names, of random weights, or `timm:NAME@FILE.safetensors` with those of a file; a
    ValueError where timm is not installed or has no such module."""
    name, _, file = name.removeprefix(TIMM).partition("@")
    has_timm = find_spec("timm") is not None
    require("load_vision", has_timm, "--vision {}{} must find timm installed (pip install timm), got none", TIMM, name)
    try:
        timm: Any = importlib.import_module("timm")
        module = timm.create_model(name, pretrained=False, num_classes=0)
    except Exception as error:  # of torchvision, which it imports, or of its registry
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"--vision must be timm:NAME of a module of timm, got {name!r}: {why}") from error
    told = timm.data.resolve_data_config({}, model=module)
    rules = {"image_size": told["input_size"][1], "image_mean": tuple(told["mean"]), "image_std": tuple(told["std"])}
    config = ForeignVision("timm", {"model_name": name}, int(module.num_features), **rules)
    if not file:
        return config, {}
    found, wanted = read_safetensors("load_vision", Path(file)), module.state_dict()
    state = {n: x for n, x in found.items() if n in wanted}
    missing = sorted(wanted.keys() - state.keys())[:3]
    require("load_vision", not missing, "{} must hold the weights of {}, missing {}", file, name, missing)
    return config, {f"body.{n}": x for n, x in state.items()}


def load_foreign_vision(folder: Path) -> tuple[ForeignVision, dict[str, Tensor]]:
    """The image module of a transformers folder (safetensors), or of a larger model in one: how it is built, and its
    weights by their names in a `ForeignImageTower`; a ValueError of what transformers does not load."""
    module, settings = _loaded(folder, "vision_model")
    size, file = settings.get("image_size", 224), folder / FILE
    if file.is_file():
        raw = read_json("load_vision", file)
        told = (raw.get("crop_size") if raw.get("do_center_crop") else None) or raw.get("size") or size
        size = told.get("height", told.get("shortest_edge", size)) if isinstance(told, Mapping) else told
    size = size[0] if isinstance(size, list | tuple) else size
    config = ForeignVision("transformers", settings, image_size=int(size))
    config = with_pictures("load_vision", folder, config)
    with torch.no_grad():
        found = _pooled(module.eval()(torch.zeros(1, 3, config.image_size, config.image_size)))
    made = {**vars(config), "width": found.shape[1]}
    return ForeignVision(**made), {f"body.{n}": x for n, x in module.state_dict().items()}


def load_foreign_text(folder: Path, context_length: int, pad_token_id: int) -> tuple[ForeignText, dict[str, Tensor]]:
    """The text encoder of a transformers folder (safetensors), as `load_foreign_vision`."""
    module, settings = _loaded(folder, "text_model")
    is_encoder, kind = not settings.get("is_encoder_decoder"), settings.get("model_type")
    require("load_text", is_encoder, "--text must hold an encoder alone, got {} with a decoder in {}", kind, folder)
    with torch.no_grad():
        width = module.eval()(input_ids=torch.zeros(1, 1, dtype=torch.int64)).last_hidden_state.shape[2]
    config = ForeignText(settings, width, int(settings["vocab_size"]), context_length, pad_token_id)
    return config, {f"body.{n}": x for n, x in module.state_dict().items()}


def _loaded(folder: Path, part: str) -> tuple[Any, dict[str, Any]]:
    """A module, and the settings that it is built by."""
    transformers: Any = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
        options = {"config": config, "use_safetensors": True, "dtype": torch.float32, **LOCAL}
        whole = _class_of(config).from_pretrained(folder, **options)
    except Exception as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} must hold a model of transformers, with safetensors, got: {why}") from error
    module = getattr(whole, part, whole)
    return module, without_dropout(module.config.to_dict())


def without_dropout(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of transformers, in which every rate of dropout is 0: two forwards of a step have to agree."""
    return {
        n: 0.0 if "drop" in n and isinstance(x, float) else without_dropout(x) if isinstance(x, dict) else x
        for n, x in settings.items()
        if n not in _UNUSED
    }


def _class_of(config: Any) -> Any:
    """The bare model of a configuration, by transformers' own way of naming."""
    transformers: Any = importlib.import_module("transformers")
    name = type(config).__name__.removesuffix("Config") + "Model"
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"transformers has no {name}")
    return found


def _transformers_module(settings: Mapping[str, Any]) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    kind = settings["model_type"]
    # the second is of a part, such as ALIGN's align_vision_model
    known = kind in transformers.CONFIG_MAPPING
    part = "".join(map(str.capitalize, kind.removesuffix("_model").split("_")))
    config = transformers.CONFIG_MAPPING[kind] if known else getattr(transformers, f"{part}Config")
    made = config.from_dict(dict(settings))
    return _class_of(made)(made)


def _image_module(config: ForeignVision) -> nn.Module:
    if config.library == "timm":
        module = importlib.import_module("timm").create_model(**config.settings, pretrained=False, num_classes=0)
    else:
        module = _transformers_module(config.settings)
    scalars = [n for n, p in module.named_parameters() if p.ndim == 0]
    what = "{} must have no 0-d weights, which DeepSpeed does not take, got {}"
    require("load_vision", not scalars, what, config.name, scalars)
    for norm in module.modules():
        if type(norm) in _NORMS:
            norm.__class__ = BatchNorm
            if norm.momentum is not None and norm.momentum > 0.5:  # the share that stays, as TensorFlow has it
                norm.momentum = 1 - norm.momentum
    return module


def _pooled(output: Any) -> Tensor:
    """[B, D] of what an image module returns: its own pooled features, else the mean of its states."""
    x = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    x = output.last_hidden_state if x is None else x
    if x.ndim == 3:
        return x.mean(1)
    return x.flatten(2).mean(2) if x.ndim == 4 else x
