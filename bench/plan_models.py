"""What `bench.plan` trains: a CLIP and a LLaVA, of any size, each as its recipe runs it."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import LlamaConfig

from mmcore.integrations.transformers import NAME as ATTENTION
from mmcore.integrations.transformers import register
from mmcore.labels import IMAGE_TOKEN
from mmcore.parts.adapters import Lora
from mmcore.parts.vit import VisionConfig
from mmcore.plan.job import Job, Setting
from mmcore.plan.pieces import language_model
from mmcore.recipe import Step
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextConfig
from mmcore.systems.clip.plan import clip_job_of
from mmcore.systems.clip.recipe import Clip, ClipBatch
from mmcore.systems.llava.inputs import ChatPart
from mmcore.systems.llava.model import Llava, LlavaConfig, Trainable
from mmcore.systems.llava.plan import llava_job_of
from mmcore.systems.llava.recipe import LlavaStage2
from mmcore.train.engine import Engine


class Trained(Protocol):
    """A model with its data."""

    def small(self) -> "Trained":
        """The same of a size at which nothing counts."""
        ...

    def job(self) -> Job: ...

    def model(self, setting: Setting) -> nn.Module: ...

    def batch(self, setting: Setting) -> Any:
        """A rank's of a step."""
        ...

    def backward(self, engine: Engine, batch: Any, setting: Setting) -> None: ...


def _vision(width: int, num_layers: int) -> VisionConfig:
    return VisionConfig(112, 16, width, num_layers, width // 64, 4 * width)


@dataclass(frozen=True)
class TrainedClip:
    """A CLIP of one width and depth, its text tower of half the width."""

    width: int
    num_layers: int

    @property
    def config(self) -> CLIPConfig:
        width, num_layers = self.width, self.num_layers
        text = TextConfig(8192, 32, width // 2, num_layers, width // 128, 2 * width)
        return CLIPConfig(256, _vision(width, num_layers), text)

    def small(self) -> "TrainedClip":
        return TrainedClip(128, 1)

    def job(self) -> Job:
        return clip_job_of("", self.config)

    def model(self, setting: Setting) -> nn.Module:
        model = CLIP(self.config)
        model.set_activation_checkpointing(setting.activation_checkpointing)
        return model

    def batch(self, setting: Setting) -> Any:
        size, text = self.config.vision.image_size, self.config.text
        images = torch.randn(setting.per_rank, 3, size, size)
        tokens = torch.randint(1, text.vocab_size - 1, (setting.per_rank, text.context_length))
        tokens[:, -1] = text.vocab_size - 1  # as long as the context, which is what a plan takes them for
        return images, tokens

    def backward(self, engine: Engine, batch: Any, setting: Setting) -> None:
        images, tokens = (x.chunk(setting.accum) for x in batch)
        parts = [ClipBatch(a, b, [b.shape[1]] * len(b)) for a, b in zip(images, tokens, strict=True)]
        Clip().backward(engine, parts, Step(0, 1, 0))


@dataclass(frozen=True)
class TrainedLlava:
    """A LLaVA before a Llama of one width and depth, its tower of half the width; a conversation a row."""

    width: int
    num_layers: int
    trainable: Trainable = "language"
    num_tokens: int = 128
    lora: Lora | None = None

    @property
    def config(self) -> LlavaConfig:
        return LlavaConfig(_vision(self.width // 2, self.num_layers))

    @property
    def language(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=4096,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.width // 64,
        )

    def small(self) -> "TrainedLlava":
        return replace(self, width=128, num_layers=1, num_tokens=64)

    def job(self) -> Job:
        return llava_job_of("", self.config, self.language, self.trainable, self.num_tokens, self.lora)

    def model(self, setting: Setting) -> nn.Module:
        register()
        is_frozen = self.trainable == "projector" or self.lora is not None
        low = is_frozen and setting.precision != "fp32"
        language = language_model(self.language, torch.bfloat16 if low else torch.float32)
        language.set_attn_implementation(ATTENTION)
        model = Llava(self.config, language, trainable=self.trainable)
        if self.lora is not None:
            model.add_adapters(self.lora)
        model.set_activation_checkpointing(setting.activation_checkpointing)
        return model.train()

    def batch(self, setting: Setting) -> Any:
        vision = self.config.vision
        size = vision.image_size
        tokens = torch.randint(1, 4096, (setting.micro, self.num_tokens))
        places = torch.arange(self.num_tokens).expand_as(tokens)
        labels = tokens.clone()
        tokens[:, 1 : 1 + vision.num_patches] = IMAGE_TOKEN
        return [
            ChatPart(tokens.clone(), labels.clone(), torch.randn(setting.micro, 3, size, size), None, places)
            for _ in range(setting.accum)
        ]

    def backward(self, engine: Engine, batch: Any, setting: Setting) -> None:
        LlavaStage2().backward(engine, batch, Step(0, 1, 0))
