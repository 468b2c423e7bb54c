"""LLaVA on disk: transformers' Llava- and LlavaNextForConditionalGeneration, and the original's mm_projector.bin."""

import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from mmcore.checkpoint import write_json
from mmcore.ops import require
from mmcore.parts.language_head import check_head
from mmcore.parts.language_weights import (
    IMAGE_MARK,
    LANGUAGE,
    image_token_of,
    language_model_of,
    language_weights,
    with_image_mark,
    without_image_row,
)
from mmcore.systems.llava import names as llava_names
from mmcore.systems.llava.model import Llava
from mmcore.weights.files import new_folder, read_folder, read_json, write_weights

# what torch's unpickler raises on damaged input
_UNPICKLER_ERRORS = (
    UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


def load_llava(folder: Path | str, *, dtype: torch.dtype | None = torch.float32) -> Llava:
    """Loads a LLaVA on the CPU from a folder that transformers or `save_llava` wrote.

    Args:
        folder: with config.json, *.safetensors and, if the language model generates by settings of its own,
            generation_config.json.
        dtype: of the language model, None = as it is stored; the rest is float32.

    Returns:
        The model, in training mode; its projector alone learns (`Llava.set_trainable`).

    Raises:
        ValueError: no such folder, a damaged file, missing or unknown names, wrong shapes, a model that ours is not.
    """
    folder, op = Path(folder), "load_llava"
    raw = read_json(op, folder / "config.json")
    parts = llava_names.parts_from_hf(op, raw)
    kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    tensors = llava_names.one_layout(read_folder(op, folder), kinds[type(parts.text)].base_model_prefix)
    language = {n.removeprefix(LANGUAGE): x for n, x in tensors.items() if n.startswith(LANGUAGE)}
    require(op, bool(language), "folder must hold a language model beside the tower, got {}", folder)
    num_rows = raw.get("language_vocab_size", parts.text.vocab_size)
    language_model = language_model_of(op, parts.text, language, dtype)
    language_model = without_image_row(language_model, num_rows, parts.image_token)
    check_head(op, language_model)
    settings = folder / "generation_config.json"
    if settings.is_file():
        stated = {name: value for name, value in read_json(op, settings).items() if value is not None}
        language_model.generation_config.update(**stated)
    with torch.device("meta"):
        model = Llava(parts.config, language_model)
    state, wanted = llava_names.from_hf(tensors, parts), model.state_dict()
    differ = [name for name, x in state.items() if x.shape != wanted[name].shape]
    require(op, not differ, "folder must hold weights of config.json's shapes, got others in {}", differ[:3])
    model.load_state_dict(state, strict=False, assign=True)
    return model.train()


def save_llava(model: Llava, folder: Path | str, *, tokenizer: Any | None = None) -> None:
    """Writes a new folder that transformers' Llava- or LlavaNextForConditionalGeneration.from_pretrained loads.

    transformers marks the places of an image by a token `<image>`, whose row of the embedding nobody reads. It is the
    tokenizer's, if that has one, else the first id that the tokenizer, or, without one, the vocabulary leaves free.
    Where the language model has no such row, what is written has one more, the mean of the others, that greedy search
    never chooses; `load_llava` takes it away again.

    Args:
        model: whose configuration and weights are written, the language model's in the dtype that they have.
        folder: must not exist yet; its parents are made.
        tokenizer: the language model's, of transformers, which is written, `<image>` in it, with what else the
            processor of this model wants, but for preprocessor_config.json.

    Raises:
        ValueError: an existing folder; a tower, projector or language model that transformers' LLaVA cannot have.
    """
    language = model.language_model
    marked = None if tokenizer is None else with_image_mark(tokenizer)
    config = llava_names.hf_config(model, image_token_of(language, marked))
    with new_folder("save_llava", Path(folder)) as staged:
        if marked is not None:
            marked.save_pretrained(staged)
            write_json(staged / "processor_config.json", _processor_config(model))
        weights = language_weights(language, config["text_config"]["vocab_size"])
        write_weights(staged, llava_names.to_hf(model) | weights)
        write_json(staged / "config.json", config)
        language.generation_config.to_json_file(staged / "generation_config.json")


def load_projector(model: Llava, file: Path | str) -> None:
    """Loads the original repository's mm_projector.bin, or the projector of a larger file of it, into a model.

    Args:
        model: whose projector, linear or MLP, takes the weights, in the dtype that it has.
        file: a pickle of tensors; of other objects none is made.

    Raises:
        ValueError: no such file, one of something else, another projector than the model's.
    """
    found = read_projector(file)
    wanted = model.projector.state_dict(prefix="projector.")
    shapes = [{n: list(x.shape) for n, x in state.items()} for state in (wanted, found)]
    what = "{} must hold a projector of shapes {}, got {}"
    require("load_projector", shapes[0] == shapes[1], what, file, *shapes)
    model.load_state_dict(found, strict=False)


def read_projector(file: Path | str) -> dict[str, Tensor]:
    """The projector in a file as `load_projector` takes it, by our names.

    Raises:
        ValueError: no such file, one of something else.
    """
    file, op = Path(file), "load_projector"
    require(op, file.is_file(), "file must exist, got {}", file)
    try:
        raw = torch.load(file, map_location="cpu", weights_only=True)
    except _UNPICKLER_ERRORS as error:
        raise ValueError(f"{op}: {file} must hold pickled tensors and nothing else, got: {error}") from error
    is_state = isinstance(raw, dict) and all(isinstance(x, Tensor) for x in raw.values())
    require(op, is_state, "{} must hold tensors by name, got {}", file, type(raw).__name__)
    return llava_names.projector_from_original(raw)


def _processor_config(model: Llava) -> dict[str, Any]:
    return {
        "processor_class": "LlavaNextProcessor" if model.config.has_tiles else "LlavaProcessor",
        "image_token": IMAGE_MARK,
        "patch_size": model.config.vision.patch_size,
        "vision_feature_select_strategy": "default",
        # the class token, which that strategy leaves out
        "num_additional_image_tokens": 1,
    }
