"""Processors of transformers for small images, with tokenizers that are learned here and templates of their kind."""

from collections.abc import Callable
from typing import Any

import pytest
import transformers as hf

from mmcore.parts.language import tiny_tokenizer
from tests.torchvision_stub import torchvision_or_skip

TEXTS = ["which digit is written here? seven", "user assistant system", "is this digit even or odd? odd\n\n"]


def template(image: str, *, begin: str = "") -> str:
    """ChatML with an image's mark."""
    part = f"{{{{ '{image}' if part['type'] == 'image' else part['text'] }}}}"
    return (
        f"{begin}{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n"
        f"{{% for part in message['content'] %}}{part}{{% endfor %}}"
        "<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )


def tokenizer(**special: str) -> Any:
    """With ChatML's marks and those that a processor asks for by name."""
    found = tiny_tokenizer(TEXTS)
    marks = ["<|im_start|>", "<|im_end|>", *special.values()]
    found.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(marks))})
    for name, mark in special.items():
        setattr(found, name, mark)
        setattr(found, f"{name}_id", found.convert_tokens_to_ids(mark))
    return found


def idefics3() -> Any:
    images = hf.Idefics3ImageProcessor(
        do_image_splitting=True, size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    return hf.Idefics3Processor(images, tokenizer(), image_seq_len=4, chat_template=template("<image>"))


def gemma3() -> Any:
    images = hf.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return hf.Gemma3Processor(
        images, tokenizer(**marks), image_seq_length=4, chat_template=template("<start_of_image>", begin="<s>")
    )


def llava_next() -> Any:
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16]]
    )
    return hf.LlavaNextProcessor(
        images, tokenizer(image_token="<image>"), patch_size=4, vision_feature_select_strategy="full",
        chat_template=template("<image>\n"), num_additional_image_tokens=0,
    )  # fmt: skip


def _qwen(kind: Any, video: Any) -> Any:
    size = {"shortest_edge": 64, "longest_edge": 1024}
    images = hf.Qwen2VLImageProcessor(size=size, patch_size=4, merge_size=2)
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    return kind(images, tokenizer(**names), video(size=size, patch_size=4), chat_template=template(mark))


def qwen2_5_vl() -> Any:
    return _qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor)


def qwen3_vl() -> Any:
    return _qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor)


def internvl() -> Any:
    images = hf.GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=2)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names["video_token"] = "<video>"
    return hf.InternVLProcessor(
        images, tokenizer(**names), hf.InternVLVideoProcessor(), image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\n"),
    )  # fmt: skip


def smolvlm() -> Any:
    pytest.importorskip("num2words", reason="transformers' SmolVLMProcessor wants num2words")
    images = hf.SmolVLMImageProcessor(
        do_image_splitting=True, size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    names = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    }
    names["end_of_utterance_token"] = "<end_of_utterance>"
    return hf.SmolVLMProcessor(
        images, tokenizer(**names), hf.SmolVLMVideoProcessor(), image_seq_len=4, chat_template=template("<image>")
    )


def llava_onevision() -> Any:
    images = hf.LlavaOnevisionImageProcessor(
        size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]]
    )
    return hf.LlavaOnevisionProcessor(
        images, tokenizer(image_token="<image>", video_token="<video>"), hf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16, vision_feature_select_strategy="full", chat_template=template("<image>\n"),
    )  # fmt: skip


def with_torchvision(make: Callable[[], Any]) -> Callable[[], Any]:
    """Skips without torchvision, which processors of videos need."""

    def made() -> Any:
        torchvision_or_skip()
        return make()

    return made


PROCESSORS: dict[str, Callable[[], Any]] = {
    "Idefics 3": idefics3, "Gemma 3": gemma3, "LLaVA-NeXT": llava_next,
    "Qwen2.5-VL": with_torchvision(qwen2_5_vl), "Qwen3-VL": with_torchvision(qwen3_vl),
    "InternVL": with_torchvision(internvl), "SmolVLM": with_torchvision(smolvlm),
    "LLaVA-OneVision": with_torchvision(llava_onevision),
}  # fmt: skip
