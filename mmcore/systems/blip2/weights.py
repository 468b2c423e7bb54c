"""BLIP-2 on disk as transformers has it: Blip2ForImageTextRetrieval, and of stage 2 Blip2ForConditionalGeneration."""

from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config

from mmcore.parts.language_weights import check_language_kind, load_with_language, save_with_language
from mmcore.parts.vit import Tower, ViT
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.model import BLIP2
from mmcore.systems.blip2.names import HF, PARTS_SETTINGS, STAGE1_SETTINGS, stage2_config
from mmcore.weights.files import read_folder, read_json, save_folder


def load_folder(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A BLIP-2 of transformers: a `BLIP2LM` where it has a language model, in `dtype` or as it is stored, else a
    `BLIP2`; errors as of `load_blip2` and `load_blip2_lm`."""
    return load_blip2_lm(folder, dtype=dtype) if has_language_model(folder) else load_blip2(folder)


def has_language_model(folder: Path) -> bool:
    """Whether a folder is of transformers' Blip2ForConditionalGeneration."""
    config = folder / "config.json"
    kinds = read_json("stage2_start", config).get("architectures") if config.is_file() else None
    return "Blip2ForConditionalGeneration" in (kinds or ())


def load_blip2(folder: Path | str) -> BLIP2:
    """BLIP-2's first stage, float32 on the CPU, in training mode, of a folder that transformers or `save_blip2` wrote.

    The captions' head and the temperature, which transformers has not, start anew where they are not there.

    Raises:
        ValueError: no such folder, a damaged file, missing or unknown names, a Q-Former without a text branch.
    """
    folder, op = Path(folder), "load_blip2"
    model = BLIP2(STAGE1_SETTINGS.read(op, read_json(op, folder / "config.json")))
    state = model.state_dict()
    model.load_state_dict(state | HF.read(op, read_folder(op, folder), state))
    return model


def load_blip2_tower(folder: Path | str) -> Tower:
    """The image tower, float32 on the CPU, in a folder of transformers or ours with a BLIP-2 of either stage; errors as
    of `load_blip2`."""
    folder, op = Path(folder), "load_tower"
    config = PARTS_SETTINGS.read(op, read_json(op, folder / "config.json"))["vision"]
    with torch.device("meta"):
        wanted = ViT(config).state_dict(prefix="visual.")
    theirs = {n: x for n, x in read_folder(op, folder).items() if n.startswith("vision_model.")}
    state = HF.read(op, theirs, wanted, unread=["vision_model.post_layernorm"])
    return Tower(config, {name.removeprefix("visual."): x for name, x in state.items()})


def save_blip2(model: BLIP2, folder: Path | str) -> None:
    """Writes a new folder that transformers' Blip2ForImageTextRetrieval.from_pretrained loads.

    What transformers has not, the captions' head and the temperature, is in it under our names.

    Raises:
        ValueError: an existing folder; a tower or sizes that transformers' BLIP-2 cannot have.
    """
    op = "save_blip2"
    save_folder(op, folder, STAGE1_SETTINGS.write(op, model.config), HF.write(model.state_dict()))


def load_blip2_lm(folder: Path | str, *, dtype: torch.dtype | None = torch.float32) -> BLIP2LM:
    """BLIP-2's second stage, on the CPU, in training mode, of a folder that transformers or `save_blip2_lm` wrote.

    Args:
        folder: with config.json, *.safetensors and perhaps the language model's generation_config.json.
        dtype: of the language model, None = as it is stored; the rest is float32.

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
    """Writes a new folder that transformers' Blip2ForConditionalGeneration.from_pretrained loads; for `<image>` and the
    tokenizer see `mmcore.parts.language_weights.save_with_language`.

    Raises:
        ValueError: an existing folder; a tower or a language model that transformers' BLIP-2 cannot have.
    """
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": model.qformer.config.num_queries}
    save_with_language("save_blip2_lm", folder, model, stage2_config, HF, tokenizer, processor)
