"""BLIP-2's second stage on disk, in the layout of transformers' Blip2ForConditionalGeneration."""

from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config

from mmcore.parts.language_weights import check_language_kind, load_with_language, save_with_language
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.names import HF, PARTS_SETTINGS, stage2_config
from mmcore.weights.files import read_json


def load_blip2_lm(folder: Path | str, *, dtype: torch.dtype | None = torch.float32) -> BLIP2LM:
    """Loads BLIP-2's second stage on the CPU from a folder that transformers or `save_blip2_lm` wrote.

    Args:
        folder: with config.json, *.safetensors and perhaps the language model's generation_config.json.
        dtype: of the language model, None = as it is stored; the rest is float32.

    Returns:
        The model, in training mode, its image tower and language model frozen.

    Raises:
        ValueError: no such folder, a damaged file, missing or unknown names, wrong shapes, no language model.
    """
    folder, op = Path(folder), "load_blip2_lm"
    raw = read_json(op, folder / "config.json")
    parts = PARTS_SETTINGS.read(op, raw)
    check_language_kind(op, (raw.get("text_config") or {}).get("model_type", "opt"))
    whole: Any = Blip2Config.from_dict(dict(raw))
    return load_with_language(op, folder, whole, dtype, HF, lambda x: BLIP2LM(**parts, language_model=x))


def save_blip2_lm(model: BLIP2LM, folder: Path | str, *, tokenizer: Any | None = None) -> None:
    """Writes a new folder that transformers' Blip2ForConditionalGeneration.from_pretrained loads.

    transformers marks the place of an image by a token `<image>`, whose row of the embedding nobody reads. It takes
    the first id that the tokenizer leaves free, or, without one, the first after the vocabulary; where the language
    model has no such row, what is written has one more, the mean of the others, that greedy search never chooses.
    `load_blip2_lm` takes it away again.

    Args:
        model: whose configuration and weights are written, the language model's in the dtype that they have.
        folder: must not exist yet; its parents are made.
        tokenizer: the language model's, of transformers, which is written, `<image>` in it, with what else
            Blip2Processor.from_pretrained wants, but for preprocessor_config.json.

    Raises:
        ValueError: an existing folder; a tower or a language model that transformers' BLIP-2 cannot have.
    """
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": model.qformer.config.num_queries}
    save_with_language("save_blip2_lm", folder, model, stage2_config, HF, tokenizer, processor)
