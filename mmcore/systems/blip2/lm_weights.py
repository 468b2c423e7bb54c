"""BLIP-2's second stage on disk, in the layout of transformers' Blip2ForConditionalGeneration."""

from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config

from mmcore.checkpoint import write_json
from mmcore.ops import require
from mmcore.parts.language_weights import (
    LANGUAGE,
    check_language_kind,
    image_token_of,
    language_model_of,
    language_weights,
    with_image_mark,
    without_image_row,
)
from mmcore.systems.blip2 import names as blip2_names
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.weights.files import new_folder, read_folder, read_json, write_weights


def load_blip2_lm(folder: Path | str, *, dtype: torch.dtype | None = torch.float32) -> BLIP2LM:
    """Loads BLIP-2's second stage on the CPU from a folder that transformers or `save_blip2_lm` wrote.

    Args:
        folder: with config.json, *.safetensors and, if the language model generates by settings of its own,
            generation_config.json.
        dtype: of the language model, None = as it is stored; the rest is float32.

    Returns:
        The model, in training mode, its image tower and language model frozen.

    Raises:
        ValueError: no such folder, a damaged file, missing or unknown names, wrong shapes, no language model.
    """
    folder, op = Path(folder), "load_blip2_lm"
    raw = read_json(op, folder / "config.json")
    vision, qformer = blip2_names.parts_from_hf(op, raw)
    tensors = read_folder(op, folder)
    language = {n.removeprefix(LANGUAGE): x for n, x in tensors.items() if n.startswith(LANGUAGE)}
    require(op, bool(language), "folder must hold a language model beside the Q-Former, got {}", folder)
    check_language_kind(op, (raw.get("text_config") or {}).get("model_type", "opt"))
    config: Any = Blip2Config.from_dict(dict(raw))
    language_model = language_model_of(op, config.text_config, language, dtype)
    num_rows = raw.get("language_vocab_size", config.text_config.vocab_size)
    language_model = without_image_row(language_model, num_rows, config.image_token_index)
    settings = folder / "generation_config.json"
    if settings.is_file():
        stated = {name: value for name, value in read_json(op, settings).items() if value is not None}
        language_model.generation_config.update(**stated)
    with torch.device("meta"):
        model = BLIP2LM(vision, qformer, language_model)
    state, wanted = blip2_names.stage2_from_hf(tensors, model), model.state_dict()
    differ = [name for name, x in state.items() if x.shape != wanted[name].shape]
    require(op, not differ, "folder must hold weights of config.json's shapes, got others in {}", differ[:3])
    model.load_state_dict(state, strict=False, assign=True)
    return model.train()


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
    language = model.language_model
    marked = None
    if tokenizer is not None:
        marked = with_image_mark(tokenizer, is_encoder_decoder=language.config.is_encoder_decoder)
    config = blip2_names.stage2_hf_config(model, image_token_of(language, marked))
    with new_folder("save_blip2_lm", Path(folder)) as staged:
        if marked is not None:
            marked.save_pretrained(staged)
            num_queries = model.qformer.config.num_queries
            processor = {"processor_class": "Blip2Processor", "num_query_tokens": num_queries}
            write_json(staged / "processor_config.json", processor)
        weights = language_weights(language, config["text_config"]["vocab_size"])
        write_weights(staged, blip2_names.stage2_to_hf(model) | weights)
        write_json(staged / "config.json", config)
        language.generation_config.to_json_file(staged / "generation_config.json")
