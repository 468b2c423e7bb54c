"""SimCLR: an image tower, and a projection that its loss reads (arXiv 2002.05709)."""

from collections.abc import Sequence

from torch import nn

from mmcore.parts.heads import projection_head
from mmcore.systems.vit.two_views import TwoViewModel


class SimCLRModel(TwoViewModel):
    """The tower, `visual`, of which the mean of the patches is read, and the head, `projector`."""

    has_joint_statistics = True

    def head(self, sizes: Sequence[int]) -> nn.Sequential:
        return projection_head(sizes, bias=False, ends_normalised=True)
