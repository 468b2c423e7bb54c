"""Small models of transformers with random weights, each with inputs that hide something."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TEXT: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
LLAMA: dict[str, Any] = TEXT | {
    "num_key_value_heads": 2, "model_type": "llama", "pad_token_id": 0, "eos_token_id": 59,
}  # fmt: skip
OPT: dict[str, Any] = {
    "model_type": "opt", "vocab_size": 60, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0,
    "pad_token_id": 1,
}  # fmt: skip
T5: dict[str, Any] = {
    "model_type": "t5", "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
CLIP_VISION: dict[str, Any] = {
    "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 12,
    "patch_size": 4, "projection_dim": 16,
}  # fmt: skip
BLIP_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
QFORMER: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 3,
    "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
IMAGE_TOKEN = 58


@dataclass(frozen=True)
class Case:
    """A model, its inputs, what is compared of its outputs and which rows of that a loss may read, bool `[B, L]`."""

    model: hf.PreTrainedModel
    inputs: dict[str, Any]
    outputs: Callable[[Any], list[Tensor]]
    rows: Tensor | None = None


def scrambled(model: nn.Module, seed: int = 0) -> Any:
    """Weights large enough that attention is far from uniform, and no gate is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1) * 0.2)
    return model.eval()


def padded(num_batches: int, length: int, side: str) -> Tensor:
    """A tokenizer's mask: sample i has i tokens of padding."""
    place, hidden = torch.arange(length), torch.arange(num_batches)[:, None]
    return (place >= hidden if side == "left" else place < length - hidden).long()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def words(num_batches: int, length: int) -> Tensor:
    return torch.randint(3, 50, (num_batches, length), generator=torch.Generator().manual_seed(2))


def logits(outputs: Any) -> list[Tensor]:
    return [outputs.logits]


def qformer(dropout: float = 0.0) -> Case:
    """Queries alone, images of different sizes."""
    inputs = {"query_embeds": noise(3, 4, 24), "encoder_hidden_states": noise(3, 11, 32)}
    inputs["encoder_attention_mask"] = padded(3, 11, "right")
    return Case(_qformer(dropout, False), inputs, lambda x: [x.last_hidden_state])


def qformer_with_text(dropout: float = 0.0) -> Case:
    """Queries and text that is padded; transformers' own cannot have a mask of the images beside it."""
    seen = torch.cat([torch.ones(3, 4), padded(3, 5, "right")], 1)
    inputs = {"query_embeds": noise(3, 9, 24), "encoder_hidden_states": noise(3, 11, 32)}
    model = _qformer(dropout, True)
    return Case(model, inputs | {"query_length": 4, "attention_mask": seen}, lambda x: [x.last_hidden_state])


def _qformer(dropout: float, with_text: bool) -> hf.Blip2QFormerModel:
    config = QFORMER | {"attention_probs_dropout_prob": dropout, "use_qformer_text_input": with_text}
    return scrambled(hf.Blip2QFormerModel(hf.Blip2QFormerConfig(**config)))


def clip(dropout: float = 0.0) -> Case:
    """Both towers, captions padded on the right."""
    text = TEXT | {"max_position_embeddings": 16, "eos_token_id": 59, "attention_dropout": dropout}
    vision = CLIP_VISION | {"attention_dropout": dropout}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    captions = words(3, 7)
    captions[torch.arange(3), 6 - torch.arange(3)] = 59
    inputs = {"input_ids": captions, "attention_mask": padded(3, 7, "right"), "pixel_values": noise(3, 3, 12, 12)}
    return Case(scrambled(hf.CLIPModel(config)), inputs, lambda x: [x.text_embeds, x.image_embeds])


def with_images(num_images: int, length: int, first: int) -> Tensor:
    """Text `[3, length]` that has placeholders for an image's patches from `first` on."""
    ids = words(3, length)
    ids[:, first : first + num_images] = IMAGE_TOKEN
    return ids


def llava() -> Case:
    """Llama with grouped queries after CLIP, prompts padded on the left."""
    vision = CLIP_VISION | {"model_type": "clip_vision_model"}
    config = hf.LlavaConfig(vision_config=vision, text_config=LLAMA, image_token_index=IMAGE_TOKEN)
    mask = padded(3, 16, "left")
    inputs = {"input_ids": with_images(9, 16, 3), "attention_mask": mask, "pixel_values": noise(3, 3, 12, 12)}
    return Case(scrambled(hf.LlavaForConditionalGeneration(config)), inputs, logits, mask.bool())


def blip2(text: dict[str, Any]) -> Case:
    """A Q-Former that every image is shown to, and OPT or T5."""
    config = hf.Blip2Config(
        vision_config=BLIP_VISION, qformer_config=QFORMER, text_config=text, num_query_tokens=4,
        image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    mask = padded(3, 10, "left")
    inputs = {"input_ids": with_images(4, 10, 3), "attention_mask": mask, "pixel_values": noise(3, 3, 12, 12)}
    model = scrambled(hf.Blip2ForConditionalGeneration(config))
    if text is T5:
        return Case(model, inputs | {"decoder_input_ids": words(3, 5)}, logits)
    return Case(model, inputs, logits, mask.bool())


def mllama() -> Case:
    """Text before its image, which sees no tile; tiles that are padding; prompts padded on the left."""
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_global_layers": 1,
        "attention_heads": 2, "vision_output_dim": 48, "image_size": 8, "patch_size": 4,
        "intermediate_layers_indices": [1],
    }  # fmt: skip
    text = hf.MllamaTextConfig(
        **TEXT | {"num_hidden_layers": 3, "num_key_value_heads": 2, "cross_attention_layers": [1]},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, pad_token_id=0, bos_token_id=1, eos_token_id=59,
    )  # fmt: skip
    mask = padded(3, 8, "left")
    seen = torch.zeros(3, 8, 2, 4, dtype=torch.long)  # [B, L, images, tiles]
    seen[0, 2:, 0, :2] = 1
    seen[1, 3:6, 0, :1] = 1
    seen[1, 6:, 1, :3] = 1
    seen[2, 4:, :, :4] = 1
    tiles = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 1]] * 2])
    inputs = {
        "input_ids": words(3, 8), "attention_mask": mask, "pixel_values": noise(3, 2, 4, 3, 8, 8),
        "aspect_ratio_ids": torch.tensor([[2, 1], [1, 3], [4, 4]]), "aspect_ratio_mask": tiles,
        "cross_attention_mask": seen,
    }  # fmt: skip
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return Case(scrambled(hf.MllamaForConditionalGeneration(config)), inputs, logits, mask.bool())


def idefics() -> Case:
    """Text before its image, which sees none and is gated to 0; prompts padded on the left."""
    vision = BLIP_VISION | {"embed_dim": 32}
    config = hf.IdeficsConfig(**TEXT, qk_layer_norms=True, vision_config=vision, pad_token_id=0, eos_token_id=59)
    mask = padded(3, 8, "left")
    seen = torch.zeros(3, 8, 2, dtype=torch.long)  # [B, L, images]
    seen[0, 2:, 0] = seen[1, 3:5, 0] = seen[1, 5:, 1] = seen[2, 4:] = 1
    inputs = {"input_ids": words(3, 8), "attention_mask": mask, "pixel_values": noise(3, 2, 3, 12, 12)}
    model = scrambled(hf.IdeficsForVisionText2Text(config))
    return Case(model, inputs | {"image_attention_mask": seen}, logits, mask.bool())
