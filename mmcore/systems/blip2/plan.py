"""BLIP-2's first stage as a plan sees it."""

from dataclasses import replace

import torch
from torch import Tensor

from mmcore.plan.demand import Built
from mmcore.plan.job import Exchange, Job, Piece, Setting, numbers
from mmcore.plan.tower import image_bytes, tower_piece
from mmcore.systems.blip2.model import BLIP2
from mmcore.systems.blip2.shapes import blip2_config


def blip2_stage1_job(name: str, num_text: int) -> Job:
    """Of a configuration by name, with texts of `num_text` tokens, on a frozen image tower.

    Raises:
        ValueError: an unknown name.
    """
    config = blip2_config(name)
    vision, qformer = config.vision, config.qformer
    with torch.device("meta"):
        of_model = numbers(BLIP2(config))

    def build(num_layers: int, samples: int, setting: Setting) -> Built:
        short = replace(
            config, vision=replace(vision, num_layers=1), qformer=replace(qformer, num_layers=num_layers)
        )
        model = BLIP2(short).train()
        states = torch.empty(samples, 1 + vision.num_patches, vision.width)

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
        (tower_piece(vision), Piece("Q-Former", qformer.num_layers, build, depths)),
        of_model.trained,
        image_bytes(vision) + 8 * num_text,
        frozen=of_model.frozen,
        small=of_model.small,
        exchange=Exchange(config.embed_dim, qformer.num_queries, has_hard_negatives=True),
    )
