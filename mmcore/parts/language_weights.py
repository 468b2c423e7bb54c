"""Language models of transformers as parts of larger models: their weights, and the token that stands for an image."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AddedToken,
)

from mmcore.ops import require

IMAGE_MARK = "<image>"
"""What transformers' processors put in a prompt where the model puts what it read of an image."""
LANGUAGE = "language_model."
"""Before the language model's own names, at home as in transformers."""


def check_language_kind(op: str, kind: str, *, is_causal: bool = False) -> None:
    """That transformers has a language model of this model type, and, where asked, a causal one.

    Raises:
        ValueError: it has not.
    """
    found = kind in CONFIG_MAPPING and _family(CONFIG_MAPPING[kind], is_causal) is not None
    what = "causal language model" if is_causal else "language model"
    require(op, found, "text_config must be of a transformers {}, got {!r}", what, kind)


def _family(config: type, is_causal: bool) -> Any:
    families: Any = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    # the first that has it, as transformers chooses
    return next((x[config] for x in families[: 1 if is_causal else 2] if config in x), None)


def language_model_of(op: str, text: Any, state: dict[str, Tensor], dtype: torch.dtype | None) -> Any:
    """A language model of transformers with these weights.

    Args:
        op: named in errors.
        text: its configuration, of a kind that `check_language_kind` knows.
        state: by its own names.
        dtype: of its weights, None = that of the first of them.

    Raises:
        ValueError: missing or unknown names, wrong shapes.
    """
    # transformers tells what differs where it is not asked to stop at it
    model, info = _family(type(text), False).from_pretrained(
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
    return model


def without_image_row(language: Any, num_rows: int, image_token: int) -> Any:
    """The language model without the row of the image's token, the last, that a larger model's file had for it."""
    if num_rows < language.config.vocab_size == image_token + 1:
        language.resize_token_embeddings(num_rows)
    return language


def image_token_of(language: Any, marked: Any | None) -> int:
    """The id of the image's token: what the tokenizer calls so, or the first after the vocabulary."""
    if marked is None:
        return language.get_input_embeddings().num_embeddings
    return marked.get_vocab()[IMAGE_MARK]


def language_weights(language: Any, vocab_size: int) -> dict[str, Tensor]:
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
        out[LANGUAGE + name] = x.detach().cpu().contiguous()
    return out


def with_image_mark(tokenizer: Any, *, is_encoder_decoder: bool = False) -> Any:
    """A copy of a language model's tokenizer that knows `<image>`; a causal model's pads on the left."""
    tokenizer = deepcopy(tokenizer)
    # as Blip2Processor adds it
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, normalized=False, special=True)], special_tokens=True)
    if not is_encoder_decoder:
        # only what was asked for when it was made is written
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"
    return tokenizer
