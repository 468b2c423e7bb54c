"""Language models of transformers as parts of larger models: their weights, and the token that stands for an image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AddedToken

from mmcore.checkpoint import write_json
from mmcore.ops import require
from mmcore.parts.language import with_origins
from mmcore.weights.files import read_folder, read_json, save_folder
from mmcore.weights.layout import Layout
from mmcore.weights.pictures import FILE as PICTURES_FILE

IMAGE_MARK = "<image>"
"""What transformers' processors put in a prompt where the model puts what it read of an image."""
LANGUAGE = "language_model."
"""Before the language model's own names, at home as in transformers."""


def check_language_kind(op: str, kind: str, *, is_causal: bool = False) -> None:
    """Raise a ValueError unless transformers has a language model of this type and, where asked, a causal one."""
    found = kind in CONFIG_MAPPING and _family(CONFIG_MAPPING[kind], is_causal) is not None
    what = "causal language model" if is_causal else "language model"
    require(op, found, "text_config must be of a transformers {}, got {!r}", what, kind)


def _family(config: type, is_causal: bool) -> Any:
    families: Any = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    # the first that has it, as transformers chooses
    return next((x[config] for x in families[: 1 if is_causal else 2] if config in x), None)


def _language_model(op: str, text: Any, state: dict[str, Tensor], dtype: torch.dtype | None) -> Any:
    """A language model of transformers with these weights, by its own names; `dtype` None = that of the first."""
    # transformers tells what differs where it is not asked to stop at it
    model, info = _family(type(text), False).from_pretrained(
        None,
        config=text,
        state_dict=state,
        dtype=next(iter(state.values())).dtype if dtype is None else dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    kinds = {
        "missing": "every weight of the language model, missing",
        "unexpected": "this language model's weights only, got also",
        "mismatched": "weights of text_config's shapes, got others in",
    }
    for kind, what in kinds.items():
        differ = sorted(info[f"{kind}_keys"])[:3]
        require(op, not differ, "a transformers file must hold {} {}", what, differ)
    return with_origins(model, state)


def load_with_language(
    op: str,
    folder: Path,
    whole: Any,
    dtype: torch.dtype | None,
    layout: Layout,
    build: Callable[[Any], nn.Module],
    *,
    unread: Sequence[str] = (),
) -> Any:
    """A model with a language model in it, of a folder of transformers or `save_with_language`, in training mode; the
    generation_config.json there is the language model's.

    Args:
        whole: transformers' configuration of the model, with a text_config of a kind that `check_language_kind` knows.
        dtype: of the language model, None = as it is stored; the rest is float32.
        layout, unread: of the weights that are not the language model's.
        build: a model, given its language model; what it makes itself is replaced.
    """
    tensors, text = layout.renamed(read_folder(op, folder)), whole.text_config
    state = {n.removeprefix(LANGUAGE): x for n, x in tensors.items() if n.startswith(LANGUAGE)}
    require(op, bool(state), "folder must hold a language model, got {}", folder)
    language = _language_model(op, text, state, dtype)
    num_rows = read_json(op, folder / "config.json").get("language_vocab_size", text.vocab_size)
    if num_rows < language.config.vocab_size == whole.image_token_index + 1:
        language.resize_token_embeddings(num_rows)
    settings = folder / "generation_config.json"
    if settings.is_file():
        stated = {name: value for name, value in read_json(op, settings).items() if value is not None}
        language.generation_config.update(**stated)
    with torch.device("meta"):
        model = build(language)
    beside = {n: x for n, x in tensors.items() if not n.startswith(LANGUAGE)}
    state = layout.read(op, beside, beside_language(model), unread=unread)
    model.load_state_dict(state, strict=False, assign=True)
    return model.train()


def beside_language(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model that are not its language model's."""
    return {n: x for n, x in model.state_dict().items() if not n.startswith((LANGUAGE, "language_head."))}


def end_at(language: Any, stops: Iterable[int]) -> None:
    """Makes a language model stop at the tokens that end the answers it learned; its own texts may end otherwise."""
    ends = sorted(stops)
    language.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def language_settings(op: str, language: Any, image_token: int) -> dict[str, Any]:
    """What config.json says of a language model, which there has a row for the image token's id; our own setting, how
    many rows it has here, beside it. A ValueError where embeddings are not as wide as the states."""
    embedding, wanted = language.get_input_embeddings(), language.config.hidden_size
    num_rows, width = embedding.num_embeddings, embedding.embedding_dim
    require(op, wanted == width, "embeddings must be as wide as the states, {}, got {}", wanted, width)
    dtype = str(language.dtype).removeprefix("torch.")
    sizes = {"dtype": dtype, "vocab_size": max(num_rows, image_token + 1)}
    text = language.config.to_dict() | sizes
    return {"image_token_index": image_token, "language_vocab_size": num_rows, "text_config": text}


def save_with_language(
    op: str,
    folder: Path | str,
    model: Any,
    config_of: Callable[[Any, int], Mapping[str, Any]],
    layout: Layout,
    tokenizer: Any | None,
    processor: Mapping[str, Any],
    pictures: Mapping[str, Any],
    unread: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a new folder of a model with a language model in it; a ValueError where it exists.

    transformers marks the places of an image by a token `<image>`, whose row of the embedding nobody reads. It is the
    tokenizer's, if that has one, else the first id that the tokenizer, or, without one, the vocabulary leaves free.
    Where the language model has no such row, what is written has one more, the mean of the others, that greedy search
    never chooses; `load_with_language` takes it away again.

    Args:
        model: its language model's weights are written in the dtype that they have.
        config_of: the model and the image's token to the config.json, with `language_settings`.
        layout: of the weights that are not the language model's.
        tokenizer: the language model's, which is written, `<image>` in it; None = none is.
        processor: the processor_config.json beside a tokenizer.
        pictures: the preprocessor_config.json.
        unread: weights that the model has there and not here.
    """
    language = model.language_model
    marked, image_token = with_image_mark(language, tokenizer)
    config = config_of(model, image_token)

    def write_more(staged: Path) -> None:
        if marked is not None:
            marked.save_pretrained(staged)
            write_json(staged / "processor_config.json", processor)
        write_json(staged / PICTURES_FILE, pictures)
        language.generation_config.to_json_file(staged / "generation_config.json")

    weights = layout.write(beside_language(model)) | dict(unread or {})
    weights |= language_weights(language, config["text_config"]["vocab_size"])
    save_folder(op, folder, config, weights, write_more)


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


def with_image_mark(language: Any, tokenizer: Any | None) -> tuple[Any | None, int]:
    """A copy of a language model's tokenizer that knows `<image>`, where a causal model's pads on the left, and that
    token's id; without a tokenizer None and the first id after the vocabulary."""
    if tokenizer is None:
        return None, language.get_input_embeddings().num_embeddings
    marked: Any = deepcopy(tokenizer)
    # as Blip2Processor adds it
    marked.add_tokens([AddedToken(IMAGE_MARK, normalized=False, special=True)], special_tokens=True)
    if not language.config.is_encoder_decoder:
        # only what was asked for when it was made is written
        marked.init_kwargs["padding_side"] = marked.padding_side = "left"
    return marked, marked.get_vocab()[IMAGE_MARK]
