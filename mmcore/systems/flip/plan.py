"""FLIP's training as a plan sees it."""

from dataclasses import dataclass, replace

from mmcore.data.transforms.masks import num_kept
from mmcore.plan.job import Job
from mmcore.systems.clip.plan import ClipPlan, clip_job_of
from mmcore.systems.clip.shapes import clip_config


@dataclass(frozen=True)
class FlipPlan(ClipPlan):
    """Plan a run of mmcore train flip: the steps that leave patches out, which the last ones do not (plan clip)."""

    mask_ratio: float = 0.5
    """As --mask-ratio of mmcore train flip."""

    def job(self) -> Job:
        config = clip_config(self.model)
        job = clip_job_of(self.model, config, num_kept(config.vision.num_patches, self.mask_ratio))
        return replace(job, name=f"FLIP {self.model}")
