"""SimSiam: an image tower, a projector and a narrow predictor (arXiv 2011.10566)."""

from collections.abc import Sequence

from torch import nn

from mmcore.parts.heads import projection_head
from mmcore.systems.vit.two_views import TwoViewModel


class SimSiamModel(TwoViewModel):
    """The tower, `visual`, of which the mean of the patches is read, and the heads, `projector` and `predictor`."""

    def head(self, sizes: Sequence[int]) -> nn.Sequential:
        return projection_head(sizes, bias=False, ends_normalised=True, ends_affine=False)

    def predicting_head(self, sizes: Sequence[int]) -> nn.Sequential:
        return projection_head(sizes, bias=False)
