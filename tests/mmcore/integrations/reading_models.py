"""Small image-text-to-text models of transformers with random weights, each with a batch of two images and texts."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

Inputs = dict[str, Tensor]
Made = tuple[Any, Inputs]
TEXT: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
IMAGE = 70
MARKS: dict[str, Any] = {
    "image_token_id": IMAGE, "video_token_id": 71, "vision_start_token_id": 72, "vision_end_token_id": 73,
}  # fmt: skip


def _words(length: int) -> Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(0))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _with_image(length: int, first: int, count: int) -> Tensor:
    ids = _words(length)
    ids[:, first : first + count] = IMAGE
    return ids


def _of_two_sizes() -> Inputs:
    """Images of 4 by 4 and 4 by 8 patches, in the form of Qwen's."""
    ids, kinds = _words(20), torch.zeros(2, 20, dtype=torch.int64)
    for row, count in enumerate((4, 8)):
        ids[row, 2 : 4 + count] = torch.tensor([72, *[IMAGE] * count, 73])
        kinds[row, 3 : 3 + count] = 1
    grids = torch.tensor([[1, 4, 4], [1, 4, 8]])
    return {"input_ids": ids, "pixel_values": _noise(48, 96), "image_grid_thw": grids, "mm_token_type_ids": kinds}


def qwen2_5_vl() -> Made:
    vision = QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(text_config=TEXT | ROPE, vision_config=vision, **MARKS)
    return hf.Qwen2_5_VLForConditionalGeneration(config), _of_two_sizes()


def qwen3_vl() -> Made:
    vision = QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = hf.Qwen3VLConfig(text_config=TEXT | ROPE | {"head_dim": 8}, vision_config=vision, **MARKS)
    return hf.Qwen3VLForConditionalGeneration(config), _of_two_sizes()


def internvl() -> Made:
    vision = VISION | {"image_size": [16, 16], "patch_size": [4, 4]}
    parts: dict[str, Any] = {"text_config": TEXT | {"model_type": "qwen2"}, "vision_config": vision}
    config = hf.InternVLConfig(**parts, image_token_id=IMAGE, image_seq_length=4)
    inputs = {"input_ids": _with_image(16, 3, 4), "pixel_values": _noise(2, 3, 16, 16)}
    return hf.InternVLForConditionalGeneration(config), inputs


def gemma3() -> Made:
    kinds = ["sliding_attention", "full_attention"]
    text = TEXT | {"head_dim": 8, "sliding_window": 8, "layer_types": kinds}
    marks: dict[str, Any] = {
        "image_token_index": IMAGE,
        "boi_token_index": 71,
        "eoi_token_index": 72,
        "mm_tokens_per_image": 4,
    }
    config = hf.Gemma3Config(text_config=text, vision_config=VISION | {"patch_size": 4}, **marks)
    ids = _with_image(16, 3, 4)
    ids[:, 2], ids[:, 7] = 71, 72
    inputs = {"input_ids": ids, "pixel_values": _noise(2, 3, 16, 16), "token_type_ids": (ids == IMAGE).long()}
    return hf.Gemma3ForConditionalGeneration(config), inputs


def smolvlm() -> Made:
    parts: dict[str, Any] = {
        "text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {"patch_size": 4},
    }  # fmt: skip
    config = hf.SmolVLMConfig(**parts, scale_factor=2, image_token_id=IMAGE)
    inputs = {"input_ids": _with_image(16, 3, 4), "pixel_values": _noise(2, 1, 3, 16, 16)}
    return hf.SmolVLMForConditionalGeneration(config), inputs


_SIGLIP = VISION | {"model_type": "siglip_vision_model", "patch_size": 8}


def paligemma() -> Made:
    text = TEXT | {"model_type": "gemma", "head_dim": 8}
    parts: dict[str, Any] = {"text_config": text, "vision_config": _SIGLIP | {"projection_dim": 32}}
    config = hf.PaliGemmaConfig(**parts, image_token_index=IMAGE, projection_dim=32, hidden_size=32)
    ids = _with_image(16, 0, 4)
    kinds = (torch.arange(16) >= 10).long().expand(2, -1)  # what is learned, and is causal
    inputs = {"input_ids": ids, "pixel_values": _noise(2, 3, 16, 16), "token_type_ids": kinds}
    return hf.PaliGemmaForConditionalGeneration(config), inputs


def llava_onevision() -> Made:
    parts: dict[str, Any] = {"text_config": TEXT | {"model_type": "qwen2"}, "vision_config": _SIGLIP}
    config = hf.LlavaOnevisionConfig(
        **parts, image_token_index=IMAGE, video_token_index=71, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]]
    )
    sizes = torch.tensor([[16, 16], [16, 16]])
    inputs = {"input_ids": _with_image(24, 3, 10), "pixel_values": _noise(2, 2, 3, 16, 16), "image_sizes": sizes}
    return hf.LlavaOnevisionForConditionalGeneration(config), inputs


MODELS: dict[str, Callable[[], Made]] = {
    "Qwen2.5-VL": qwen2_5_vl, "Qwen3-VL": qwen3_vl, "InternVL": internvl, "Gemma 3": gemma3, "SmolVLM": smolvlm,
    "PaliGemma": paligemma, "LLaVA-OneVision": llava_onevision,
}  # fmt: skip
