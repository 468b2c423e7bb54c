"""LiT's training as a plan sees it."""

from dataclasses import dataclass, replace

import torch

from mmcore.plan import pieces
from mmcore.plan.job import Job, MicroBatchPlan, numbers
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.plan import clip_job_of
from mmcore.systems.clip.shapes import clip_config


@dataclass(frozen=True)
class LitPlan(MicroBatchPlan):
    """Plan a run of mmcore train lit."""

    model: str = "ViT-L-14"
    """As --model of mmcore train clip: its image tower, which is locked, and the text tower."""

    def job(self) -> Job:
        config = clip_config(self.model)
        config = replace(config, embed_dim=config.vision.width, has_image_proj=False)
        with torch.device("meta"):
            model = CLIP(config)
            model.visual.requires_grad_(False)
            of_model = numbers(model)
        job = clip_job_of(self.model, config)
        text = next(piece for piece in job.pieces if piece.name == "text tower")
        locked = pieces.tower_piece(config.vision)
        return replace(
            job, name=f"LiT {self.model}", pieces=(locked, text), trained=of_model.trained, frozen=of_model.frozen
        )
