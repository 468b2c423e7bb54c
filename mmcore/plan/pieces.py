"""What plans of several systems count: image towers, and language models by the shapes that were published or by the
config.json of a folder; no weights are read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from mmcore.ops import attention, require
from mmcore.parts.language import LanguageHead
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.plan.demand import Built
from mmcore.plan.job import Numbers, Piece, Setting, numbers

OP = "mmcore plan"
ATTENTION = "mmcore-plan"


def _llama(hidden: int, mlp: int, layers: int, heads: int, key_heads: int, vocab: int) -> dict[str, Any]:
    counts = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    return {"hidden_size": hidden, "intermediate_size": mlp, "vocab_size": vocab} | counts


def _opt(hidden: int, layers: int) -> dict[str, Any]:
    widths = {"hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden}
    return widths | {"num_hidden_layers": layers, "num_attention_heads": 32, "vocab_size": 50272}


LLMS: dict[str, tuple[str, dict[str, Any]]] = {
    "vicuna-7b": ("llama", _llama(4096, 11008, 32, 32, 32, 32000)),
    "vicuna-13b": ("llama", _llama(5120, 13824, 40, 40, 40, 32000)),
    "llama-3-8b": ("llama", _llama(4096, 14336, 32, 32, 8, 128256)),
    "qwen2-0.5b": ("qwen2", _llama(896, 4864, 24, 14, 2, 151936) | {"tie_word_embeddings": True}),
    "qwen2-7b": ("qwen2", _llama(3584, 18944, 28, 28, 4, 152064)),
    "opt-2.7b": ("opt", _opt(2560, 32)),
    "opt-6.7b": ("opt", _opt(4096, 32)),
}


def language_config(name: str) -> Any:
    """The configuration of a key of `LLMS`, or of a folder with the config.json of a causal model of transformers; a
    ValueError of another name, or of an encoder-decoder."""
    if name in LLMS:
        kind, shape = LLMS[name]
        return AutoConfig.for_model(kind, **shape)
    what = "--llm must be one of {}, or a folder with a config.json, got {}"
    require(OP, (Path(name) / "config.json").is_file(), what, ", ".join(LLMS), name)
    config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    is_causal = not config.is_encoder_decoder
    require(OP, is_causal, "--llm must be a causal model, got an encoder-decoder in {}", name)
    return config


def language_model(config: Any, dtype: torch.dtype, *, num_layers: int | None = None) -> Any:
    """The model, on whatever tensors are made where it is called; `num_layers` None = all."""
    shape = config.to_dict()
    if num_layers is not None:
        shape["num_hidden_layers"] = num_layers
        if shape.get("layer_types"):
            shape["layer_types"] = shape["layer_types"][:num_layers]
    config = type(config).from_dict(shape)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation(ATTENTION)  # a model that is made with it is refused where it has its own
    return model.train()


def language_piece(
    config: Any, num_tokens: int, num_learned: int, prepare: Callable[[Any, Setting], Any], *, learns: bool
) -> Piece:
    """A language model, which `prepare` makes ready for training: a pass over `num_tokens` embeddings a sample, which
    want a gradient, and the loss of the last `num_learned`."""

    def build(num_layers: int, samples: int, setting: Setting) -> Built:
        # frozen, it is bfloat16 but in fp32
        low = not learns and setting.precision != "fp32"
        dtype = torch.bfloat16 if low else setting.dtype
        if learns:
            model = prepare(language_model(config, dtype, num_layers=num_layers), setting)
        else:  # peft moves its weights, which fake ones refuse; that ties are undone is nothing to frozen ones
            with unset_fake_temporarily(), torch.device("meta"):
                model = prepare(language_model(config, dtype, num_layers=num_layers), setting)
            model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype))
        head, embedding = LanguageHead(model.get_output_embeddings()), model.get_input_embeddings().weight
        shape = (samples, num_tokens, embedding.shape[1])
        embedded = torch.empty(shape, dtype=embedding.dtype, requires_grad=True)
        labels = torch.empty(samples, num_learned, dtype=torch.int64)

        def forward() -> list[Tensor]:
            states = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            return [head(states[:, num_tokens - num_learned :], labels)]

        return Built(model.parameters(), forward)

    name = "language model" if learns else "language model, frozen"
    return Piece(name, config.num_hidden_layers, build)


def language_numbers(config: Any) -> Numbers:
    with torch.device("meta"):
        return numbers(language_model(config, torch.float32))


def language_width(config: Any) -> int:
    with torch.device("meta"):
        return language_model(config, torch.float32, num_layers=1).get_input_embeddings().embedding_dim


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What a fused attention leaves to its backward does not depend on the mask."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, scale=options.get("scaling"), backend="mmkernels").contiguous(), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, lambda **_: None)


def tower_piece(config: VisionConfig, *, learns: bool = False) -> Piece:
    """A ViT from pixels to states; frozen, it leaves nothing to a backward."""

    def build(num_layers: int, samples: int, setting: Setting) -> Built:
        tower = ViT(replace(config, num_layers=num_layers)).requires_grad_(learns)
        tower.transformer.activation_checkpointing = setting.activation_checkpointing
        images = torch.empty(samples, 3, config.image_size, config.image_size, dtype=torch.uint8)

        def forward() -> list[Tensor]:
            with torch.set_grad_enabled(learns):
                return [tower(images)]

        return Built(tower.parameters(), forward)

    return Piece("image tower" if learns else "image tower, frozen", config.num_layers, build)


def image_bytes(config: VisionConfig) -> int:
    """Bytes of an image as the loader hands it over, uint8."""
    return 3 * config.image_size**2
