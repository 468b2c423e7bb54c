"""LLaVA on disk: transformers' Llava- and LlavaNextForConditionalGeneration, and the original's mm_projector.bin."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from mmcore.ops import require
from mmcore.parts.language_head import check_head
from mmcore.parts.language_weights import IMAGE_MARK, load_with_language, save_with_language
from mmcore.systems.llava.model import Llava
from mmcore.systems.llava.names import config_from_hf, hf_config, hf_layout, unread_norm
from mmcore.weights.files import read_json, read_pickle


def load_llava(folder: Path | str, *, dtype: torch.dtype | None = torch.float32) -> Llava:
    """A LLaVA on the CPU, in training mode, of a folder that transformers or `save_llava` wrote; its projector alone
    learns (`Llava.set_trainable`).

    Args:
        folder: with config.json, *.safetensors and perhaps the language model's generation_config.json.
        dtype: of the language model, None = as it is stored; the rest is float32.

    Raises:
        ValueError: no such folder, a damaged file, missing or unknown names, wrong shapes, a model that ours is not.
    """
    folder, op = Path(folder), "load_llava"
    config, whole, unread = config_from_hf(op, read_json(op, folder / "config.json"))
    families: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    layout = hf_layout(families[type(whole.text_config)].base_model_prefix)
    model = load_with_language(op, folder, whole, dtype, layout, lambda x: Llava(config, x), unread=unread)
    check_head(op, model.language_model)
    return model


def save_llava(model: Llava, folder: Path | str, *, tokenizer: Any | None = None) -> None:
    """Writes a new folder that transformers' Llava- or LlavaNextForConditionalGeneration.from_pretrained loads; for
    `<image>` and the tokenizer see `mmcore.parts.language_weights.save_with_language`.

    Raises:
        ValueError: an existing folder; a tower, projector or language model that transformers' LLaVA cannot have.
    """
    processor = {
        "processor_class": "LlavaNextProcessor" if model.config.has_tiles else "LlavaProcessor",
        "image_token": IMAGE_MARK,
        "patch_size": model.config.vision.patch_size,
        "vision_feature_select_strategy": "default",
        # the class token, which that strategy leaves out
        "num_additional_image_tokens": 1,
    }
    save_with_language("save_llava", folder, model, hf_config, hf_layout(), tokenizer, processor, unread_norm(model))


def load_projector(model: Llava, file: Path | str) -> None:
    """Loads the original repository's mm_projector.bin, or the projector of a larger file of it, into a model; no other
    object of the pickle is made. A ValueError without such a file, or of another projector than the model's."""
    found = read_projector(file)
    wanted = model.projector.state_dict(prefix="projector.")
    shapes = [{n: list(x.shape) for n, x in state.items()} for state in (wanted, found)]
    what = "{} must hold a projector of shapes {}, got {}"
    require("load_projector", shapes[0] == shapes[1], what, file, *shapes)
    model.load_state_dict(found, strict=False)


def read_projector(file: Path | str) -> dict[str, Tensor]:
    """The projector in a file as `load_projector` takes it, by our names; a ValueError for anything else."""
    state, prefix = read_pickle("load_projector", Path(file)), "model.mm_"
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(f"{prefix}projector.")}
