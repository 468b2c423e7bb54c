"""BLIP-2's second stage and both of LLaVA as a plan sees them: what ends in a language model."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mmcore.nn import Linear
from mmcore.ops import require
from mmcore.parts.vit import ViT
from mmcore.plan.demand import Built
from mmcore.plan.job import Job, Numbers, Piece, Setting, numbers
from mmcore.plan.language import OP, language_config, language_model, read
from mmcore.plan.tower import image_bytes, tower_piece
from mmcore.systems.blip2.qformer import QFormer
from mmcore.systems.blip2.shapes import blip2_config
from mmcore.systems.clip.shapes import clip_config
from mmcore.systems.llava.model import Llava, LlavaConfig, Lora, Trainable


def blip2_stage2_job(name: str, llm: str, num_text: int) -> Job:
    """Of a configuration by name before a frozen language model; `num_text` tokens of prompt and answer."""
    config, language = blip2_config(name), language_config(llm)
    vision = config.vision
    qformer = replace(config.qformer, has_text=False)

    def prepare(model: Any, _: Setting) -> Any:
        return model.requires_grad_(False).eval()

    def between(num_layers: int) -> nn.ModuleList:
        """What learns: norm, Q-Former, projection."""
        short = replace(qformer, num_layers=num_layers)
        norm = nn.LayerNorm(vision.width, eps=vision.norm_eps)
        return nn.ModuleList([norm, QFormer(short), Linear(qformer.width, _width(language))])

    def build(num_layers: int, samples: int, setting: Setting) -> Built:
        norm, former, projection = parts = between(num_layers)
        states = torch.empty(samples, 1 + vision.num_patches, vision.width)
        return Built(parts.parameters(), lambda: [projection(former(norm(states)))])

    with torch.device("meta"):
        learned = numbers(between(qformer.num_layers))
        of_tower = numbers(ViT(vision).requires_grad_(False))
    of_language = _numbers(language)
    every = qformer.cross_every
    return Job(
        f"BLIP-2 stage 2, {name} before {llm}",
        (
            tower_piece(vision),
            Piece("Q-Former", qformer.num_layers, build, (every, 2 * every)),
            _language_piece(language, qformer.num_queries + num_text, num_text, prepare, learns=False),
        ),
        learned.trained,
        image_bytes(vision) + 8 * num_text,
        frozen=of_tower.frozen,
        frozen_low=of_language.trained,
        small=learned.small + of_tower.small + of_language.small,
    )


def llava_job(
    stage: Literal[1, 2],
    vision_name: str,
    llm: str,
    *,
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu",
    num_tokens: int | None = None,
    train_vision: bool = False,
    lora: Lora | None = None,
) -> Job:
    """Of a CLIP's tower, less its last layer, before a language model.

    Args:
        stage: 1 trains the projector, 2 the language model too.
        vision_name: a key of `CLIP_CONFIGS`.
        llm: see `language_config`.
        projector: see `LlavaConfig`.
        num_tokens: of a conversation, those of its image included; None = a caption of 64 in stage 1, a whole row of
            2,048 in stage 2.
        train_vision: the tower learns too, in stage 2.
        lora: of the adapters that learn in place of the language model's weights, in stage 2.

    Raises:
        ValueError: an unknown name; fewer tokens than an image has.
    """
    whole = clip_config(vision_name).vision
    vision = replace(whole, num_layers=whole.num_layers - 1)
    least = vision.num_patches + 2
    num_tokens = num_tokens or (vision.num_patches + 64 if stage == 1 else 2048)
    require(OP, num_tokens >= least, "--tokens must be at least {}, got {}", least, num_tokens)
    trainable = "projector" if stage == 1 else "all" if train_vision else "language"
    name = f"LLaVA stage {stage}, {vision_name} before {llm}"
    if lora is not None:
        name += f" with adapters of rank {lora.rank}"
    return llava_job_of(
        name, LlavaConfig(vision, projector), language_config(llm), trainable, num_tokens, lora
    )


def llava_job_of(
    name: str,
    config: LlavaConfig,
    language: Any,
    trainable: Trainable,
    num_tokens: int,
    lora: Lora | None = None,
) -> Job:
    """Of any configuration, `language` one of transformers."""
    vision, learns = config.vision, trainable != "projector" and lora is None

    def adapted(config: LlavaConfig, model: Any) -> Llava:
        whole = Llava(config, model, trainable=trainable)
        if lora is not None:  # loaded by name: peft takes seconds to import
            importlib.import_module("mmcore.parts.adapters").add_adapters(whole, lora)
        return whole

    def prepare(model: Any, setting: Setting) -> Any:
        whole = adapted(replace(config, vision=replace(vision, num_layers=1)), model)
        if setting.precision == "bf16":
            whole.bfloat16()  # the adapters, as its engine does
        whole.set_activation_checkpointing(setting.activation_checkpointing)
        return whole.train().language_model

    def project(_: int, samples: int, setting: Setting) -> Built:
        model = Llava(config, language_model(language, setting.dtype, num_layers=1))
        shape = (samples, vision.num_patches, vision.width)
        states = torch.empty(shape, requires_grad=trainable == "all")
        return Built(model.projector.parameters(), lambda: [model.projector(states)])

    with torch.device("meta"):
        of_model = numbers(adapted(config, language_model(language, torch.float32)))
    low = 0 if learns else _numbers(language).trained
    return Job(
        name,
        (
            tower_piece(vision, learns=trainable == "all"),
            Piece("projector", 1, project),
            _language_piece(language, num_tokens, num_tokens - 1, prepare, learns=learns),
        ),
        of_model.trained,
        image_bytes(vision) + 3 * 8 * num_tokens,
        frozen=of_model.frozen - low,
        frozen_low=low,
        small=of_model.small,
        levers=("accum", "activation_checkpointing", "zero"),
    )


def _language_piece(
    config: Any, num_tokens: int, num_learned: int, prepare: Callable[[Any, Setting], Any], *, learns: bool
) -> Piece:
    """A language model, which `prepare` makes ready for training."""

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
        return read(model, samples, num_tokens, num_learned)

    name = "language model" if learns else "language model, frozen"
    return Piece(name, config.num_hidden_layers, build)


def _numbers(config: Any) -> Numbers:
    with torch.device("meta"):
        return numbers(language_model(config, torch.float32))


def _width(config: Any) -> int:
    with torch.device("meta"):
        return language_model(config, torch.float32, num_layers=1).get_input_embeddings().embedding_dim
