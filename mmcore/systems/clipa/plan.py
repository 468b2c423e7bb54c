"""CLIPA's training as a plan sees it."""

from dataclasses import dataclass, replace

from mmcore.plan.job import Job
from mmcore.systems.clip.plan import ClipPlan, clip_job_of
from mmcore.systems.clip.shapes import clip_config


@dataclass(frozen=True)
class ClipaPlan(ClipPlan):
    """Plan a run of mmcore train clipa: the steps on smaller pictures and shorter captions, not the last ones (plan
    clip)."""

    image_scale: float = 0.5
    """As --image-scale of mmcore train clipa."""
    text_tokens: int = 8
    """As --text-tokens of mmcore train clipa."""

    def job(self) -> Job:
        config = clip_config(self.model)
        patch = config.vision.patch_size
        side = max(1, round(config.vision.image_size * self.image_scale / patch)) * patch
        vision, text = replace(config.vision, image_size=side), replace(config.text, context_length=self.text_tokens)
        return replace(clip_job_of(self.model, replace(config, vision=vision, text=text)), name=f"CLIPA {self.model}")
