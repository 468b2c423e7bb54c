"""Folders of image-text-to-text models of transformers: read, checked, written; and a tiny one, made from nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
)

from mmcore.integrations.transformers import NAME, register
from mmcore.ops import require
from mmcore.parts.language import END, PAD, START, tiny_tokenizer
from mmcore.systems.vlm.model import ReadingModel
from mmcore.weights.files import LOCAL

SIDE, PATCH = 16, 4
"""Pixels of the tiny model's images and patches."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
)


def load_body(folder: Path, dtype: torch.dtype | None) -> Any:
    """A model in a folder of transformers (safetensors), on our attention, in evaluation mode on the CPU, in a dtype or
    as it is stored; a ValueError of anything else."""
    op = "vlm"
    require(op, folder.is_dir(), "--from must be a folder of transformers, got {}", folder)
    register()
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "use_safetensors": True}
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        options |= {"config": config, "output_loading_info": True, **LOCAL}
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{op}: --from must hold an image-text-to-text model, got {folder}: {why}") from None
    model, info = loaded
    missing = sorted(info["missing_keys"])[:3]
    require(op, not missing, "--from must hold every weight of the model, missing {}", ", ".join(missing))
    parts = hasattr(model, "model") and model.get_output_embeddings() is not None and hasattr(model, "get_decoder")
    require(op, parts, "--from must be of a model with a decoder behind it, got a {}", type(model).__name__)
    model.set_attn_implementation(NAME)
    return model.eval()


def load_processor(folder: Path, max_pixels: int | None) -> Any:
    """The processor in a folder; with `max_pixels` larger images are made smaller, where it can."""
    try:
        processor: Any = AutoProcessor.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"vlm: --from must hold a processor, got {folder}: {why}") from None
    is_one = hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")
    require("vlm", is_one, "--from must hold a processor of images and texts, got a {}", type(processor).__name__)
    if max_pixels is not None:
        images: Any = processor.image_processor
        size: Any = getattr(images, "size", None) or {}
        has_pixels = "longest_edge" in size and "shortest_edge" in size
        what = "--max-pixels must be left out: {} does not bound an image by pixels, got {}"
        require("vlm", has_pixels, what, type(images).__name__, max_pixels)
        least = int(size["shortest_edge"])
        require("vlm", max_pixels >= least, "--max-pixels must be at least {}, got {}", least, max_pixels)
        images.size = type(size)(shortest_edge=least, longest_edge=max_pixels)
    return processor


def tiny(texts: Sequence[str], seed: int) -> tuple[Any, Any]:
    """An Idefics 3 of a million parameters, untrained, and its processor, whose tokens are learned from texts."""
    tokenizer = tiny_tokenizer([*texts, "user: assistant: system:"])
    images = Idefics3ImageProcessor(
        do_image_splitting=False, size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}
    )
    count = (SIDE // PATCH) ** 2
    processor: Any = Idefics3Processor(images, tokenizer, image_seq_len=count, chat_template=TEMPLATE)
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": tokenizer.get_vocab()[x] for name, x in (("pad", PAD), ("bos", START), ("eos", END))}
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 512, **shape, **ids}
    vision = {**shape, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH}
    parts: dict[str, Any] = {"text_config": text, "vision_config": vision, "pad_token_id": ids["pad_token_id"]}
    image_token = tokenizer.get_vocab()["<image>"]
    config = Idefics3Config(**parts, scale_factor=1, image_token_id=image_token)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model: Any = Idefics3ForConditionalGeneration(config)
    register()
    model.set_attn_implementation(NAME)
    for name in ("pad", "bos", "eos"):
        setattr(model.generation_config, f"{name}_token_id", ids[f"{name}_token_id"])
    return model, processor


def load_reading_model(folder: Path | str, dtype: torch.dtype | None = torch.float32) -> ReadingModel:
    """The model in a folder of transformers; errors as of `load_body`."""
    return ReadingModel(load_body(Path(folder), dtype))
