"""CLIP's training as a plan sees it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mmcore.parts.image_tower import ImageTower
from mmcore.plan.demand import Built
from mmcore.plan.job import Exchange, Job, MicroBatchPlan, Piece, Setting, numbers
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextTower
from mmcore.systems.clip.shapes import clip_config

# the last layer's feed-forward is of pooled tokens alone, so that one layer is not like the others
DEPTHS = 2, 3


def clip_job(name: str) -> Job:
    """Of a configuration by name; every caption as long as the context."""
    return clip_job_of(name, clip_config(name))


def clip_job_of(name: str, config: CLIPConfig) -> Job:
    """Of any configuration."""
    vision, text = config.vision, config.text
    with torch.device("meta"):
        of_model = numbers(CLIP(config))

    def images(num_layers: int, samples: int, setting: Setting) -> Built:
        tower = ImageTower(replace(vision, num_layers=num_layers), config.embed_dim)
        tower.transformer.activation_checkpointing = setting.activation_checkpointing
        x = torch.empty(samples, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
        return _embedding(tower, x)

    def texts(num_layers: int, samples: int, setting: Setting) -> Built:
        tower = TextTower(replace(text, num_layers=num_layers), config.embed_dim)
        tower.transformer.activation_checkpointing = setting.activation_checkpointing
        tokens = torch.empty(samples, text.context_length, dtype=torch.int64)
        return _embedding(tower, tokens, [text.context_length] * samples)

    return Job(
        f"CLIP {name}",
        (Piece("image tower", vision.num_layers, images, DEPTHS), Piece("text tower", text.num_layers, texts, DEPTHS)),
        of_model.trained,
        batch_bytes=3 * vision.image_size**2 + 8 * text.context_length,
        small=of_model.small,
        exchange=Exchange(config.embed_dim),
        levers=("accum", "activation_checkpointing", "zero"),
    )


def _embedding(tower: nn.Module, *inputs: Any) -> Built:
    """From inputs to features of unit norm, as `CLIP` makes them."""
    return Built(tower.parameters(), lambda: [F.normalize(tower(*inputs).float(), dim=-1)])


@dataclass(frozen=True)
class ClipPlan(MicroBatchPlan):
    """Plan a run of mmcore train clip."""

    model: str = "ViT-L-14"
    """As --model of mmcore train clip."""

    def job(self) -> Job:
        return clip_job(self.model)
