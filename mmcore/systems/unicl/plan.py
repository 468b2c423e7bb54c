"""UniCL's training as a plan sees it."""

from dataclasses import dataclass, replace

from mmcore.plan.job import Job
from mmcore.systems.clip.plan import ClipPlan


@dataclass(frozen=True)
class UniclPlan(ClipPlan):
    """Plan a run of mmcore train unicl."""

    def job(self) -> Job:
        return replace(super().job(), name=f"UniCL {self.model}")
