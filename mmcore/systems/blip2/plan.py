"""BLIP-2's stages as a plan sees them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.nn import Linear
from mmcore.parts.vit import ViT
from mmcore.plan import pieces
from mmcore.plan.demand import Built
from mmcore.plan.job import Exchange, Job, Piece, PlanConfig, Setting, numbers
from mmcore.systems.blip2.model import BLIP2
from mmcore.systems.blip2.qformer import QFormer
from mmcore.systems.blip2.shapes import blip2_config


def blip2_stage1_job(name: str, num_text: int) -> Job:
    """Of a configuration by name, with texts of `num_text` tokens, on a frozen image tower."""
    config = blip2_config(name)
    vision, qformer = config.vision, config.qformer
    with torch.device("meta"):
        of_model = numbers(BLIP2(config))

    def build(num_layers: int, samples: int, setting: Setting) -> Built:
        short = replace(config, vision=replace(vision, num_layers=1), qformer=replace(qformer, num_layers=num_layers))
        model = BLIP2(short).train()
        states = torch.empty(samples, vision.num_tokens, vision.width)

        def texts(rows: int) -> tuple[Tensor, Tensor]:
            return torch.empty(rows, num_text, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)

        def forward() -> list[Tensor]:
            pairs = model.pairs(states, *texts(samples))
            # a right pair, a hard image and a hard text of each; with other ranks, the hard images are theirs
            foreign = states if setting.gpus > 1 else states[:0]
            index = torch.empty(3 * samples, dtype=torch.int64)
            logits = model.match(pairs.keys_values, foreign, index, *texts(3 * samples))
            return [pairs.image, pairs.text, pairs.caption_loss, logits]

        return Built(model.parameters(), forward)

    depths = (qformer.cross_every, 2 * qformer.cross_every)
    return Job(
        f"BLIP-2 stage 1, {name}",
        (pieces.tower_piece(vision), Piece("Q-Former", qformer.num_layers, build, depths)),
        of_model.trained,
        pieces.image_bytes(vision) + 8 * num_text,
        frozen=of_model.frozen,
        small=of_model.small,
        exchange=Exchange(config.embed_dim, qformer.num_queries, has_hard_negatives=True),
    )


def blip2_stage2_job(name: str, llm: str, num_text: int) -> Job:
    """Of a configuration by name before a frozen language model; `num_text` tokens of prompt and answer."""
    config, language = blip2_config(name), pieces.language_config(llm)
    vision = config.vision
    qformer = replace(config.qformer, has_text=False)

    def prepare(model: Any, _: Setting) -> Any:
        return model.requires_grad_(False).eval()

    def between(num_layers: int) -> nn.ModuleList:
        """What learns: norm, Q-Former, projection."""
        short = replace(qformer, num_layers=num_layers)
        norm = nn.LayerNorm(vision.width, eps=vision.norm_eps)
        return nn.ModuleList([norm, QFormer(short), Linear(qformer.width, pieces.language_width(language))])

    def build(num_layers: int, samples: int, setting: Setting) -> Built:
        norm, former, projection = parts = between(num_layers)
        states = torch.empty(samples, vision.num_tokens, vision.width)
        return Built(parts.parameters(), lambda: [projection(former(norm(states)))])

    with torch.device("meta"):
        learned = numbers(between(qformer.num_layers))
        of_tower = numbers(ViT(vision).requires_grad_(False))
    of_language = pieces.language_numbers(language)
    every = qformer.cross_every
    return Job(
        f"BLIP-2 stage 2, {name} before {llm}",
        (
            pieces.tower_piece(vision),
            Piece("Q-Former", qformer.num_layers, build, (every, 2 * every)),
            pieces.language_piece(language, qformer.num_queries + num_text, num_text, prepare, learns=False),
        ),
        learned.trained,
        pieces.image_bytes(vision) + 8 * num_text,
        frozen=of_tower.frozen,
        frozen_low=of_language.trained,
        small=learned.small + of_tower.small + of_language.small,
    )


@dataclass(frozen=True)
class Stage1Plan(PlanConfig):
    """Plan a run of mmcore train blip2-stage1 on a frozen image tower."""

    model: str = "ViT-g"
    """As --model of mmcore train blip2-stage1."""
    max_text: int = 32
    """Tokens of a caption, [CLS] and [SEP] included."""

    def job(self) -> Job:
        return blip2_stage1_job(self.model, self.max_text)


@dataclass(frozen=True)
class Stage2Plan(PlanConfig):
    """Plan a run of mmcore train blip2-stage2."""

    model: str = "ViT-g"
    """Shape of tower and Q-Former, as --model of mmcore train blip2-stage1."""
    llm: str = "opt-2.7b"
    """vicuna-7b, vicuna-13b, llama-3-8b, qwen2-0.5b, qwen2-7b, opt-2.7b, opt-6.7b, or a folder with the config.json of
    a causal model of transformers."""
    max_text: int = 32
    """Tokens of prompt and answer."""

    def job(self) -> Job:
        return blip2_stage2_job(self.model, self.llm, self.max_text)
