"""BLIP-2's second stage on disk, in the layout of transformers' Blip2ForConditionalGeneration."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AddedToken,
    Blip2Config,
)

from mmcore.checkpoint import write_json
from mmcore.models import blip2_names
from mmcore.models.blip2_lm import BLIP2LM
from mmcore.models.files import new_folder, read_folder, read_json, write_weights
from mmcore.ops import require

IMAGE_TOKEN = "<image>"
"""What Blip2Processor puts in a prompt where the model puts what its Q-Former read."""


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
    tensors, prefix = read_folder(op, folder), blip2_names.LANGUAGE
    language = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    require(op, bool(language), "folder must hold a language model beside the Q-Former, got {}", folder)
    language_model = _language_model(op, raw, language, dtype)
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
    image_token = language.get_input_embeddings().num_embeddings
    marked = None if tokenizer is None else _with_image_token(tokenizer, language.config.is_encoder_decoder)
    if marked is not None:
        image_token = marked.get_vocab()[IMAGE_TOKEN]
    config = blip2_names.stage2_hf_config(model, image_token)
    with new_folder("save_blip2_lm", Path(folder)) as staged:
        if marked is not None:
            marked.save_pretrained(staged)
            num_queries = model.qformer.config.num_queries
            processor = {"processor_class": "Blip2Processor", "num_query_tokens": num_queries}
            write_json(staged / "processor_config.json", processor)
        weights = _language_weights(language, config["text_config"]["vocab_size"])
        write_weights(staged, blip2_names.stage2_to_hf(model) | weights)
        write_json(staged / "config.json", config)
        language.generation_config.to_json_file(staged / "generation_config.json")


def _language_model(
    op: str, raw: Mapping[str, Any], state: dict[str, Tensor], dtype: torch.dtype | None
) -> Any:
    kind = (raw.get("text_config") or {}).get("model_type", "opt")
    # the first that has it, as transformers chooses
    families: Any = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    found = [x for x in families if kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in x]
    require(op, bool(found), "text_config must be of a transformers language model, got {!r}", kind)
    config: Any = Blip2Config.from_dict(dict(raw))
    text = config.text_config
    # transformers tells what differs where it is not asked to stop at it
    model, info = found[0][type(text)].from_pretrained(
        None,
        config=text,
        state_dict=state,
        dtype=next(iter(state.values())).dtype if dtype is None else dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    for what, differ in (
        ("every weight of the language model, missing", info["missing_keys"]),
        ("this language model's weights only, got also", info["unexpected_keys"]),
        ("weights of text_config's shapes, got others in", info["mismatched_keys"]),
    ):
        require(op, not differ, "a transformers file must hold {} {}", what, sorted(differ)[:3])
    num_rows = raw.get("language_vocab_size", text.vocab_size)
    if num_rows < text.vocab_size == config.image_token_index + 1:
        model.resize_token_embeddings(num_rows)
    return model


def _language_weights(language: Any, vocab_size: int) -> dict[str, Tensor]:
    """The language model's weights by transformers' names, tied ones once; the vocabulary's rows grow by their mean."""
    head = language.get_output_embeddings()
    of_vocab = {id(x) for x in (language.get_input_embeddings().weight, head.weight, head.bias)}
    out, seen = {}, set()
    for name, x in language.state_dict(keep_vars=True).items():
        if id(x) in seen:
            continue
        seen.add(id(x))
        if id(x) in of_vocab and len(x) < vocab_size:
            mean = x.detach().mean(0, keepdim=True, dtype=torch.float64).to(x.dtype)
            x = torch.cat([x.detach(), mean.expand(vocab_size - len(x), *x.shape[1:])])
        out[blip2_names.LANGUAGE + name] = x.detach().cpu().contiguous()
    return out


def _with_image_token(tokenizer: Any, is_encoder_decoder: bool) -> Any:
    tokenizer = deepcopy(tokenizer)
    # as Blip2Processor adds it
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    if not is_encoder_decoder:
        # only what was asked for when it was made is written
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"
    return tokenizer
