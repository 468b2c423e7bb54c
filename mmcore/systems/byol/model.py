"""BYOL: an image tower, a projector and a predictor of the same layers (arXiv 2006.07733)."""

from collections.abc import Sequence

from torch import nn

from mmcore.parts.heads import projection_head
from mmcore.systems.vit.two_views import TwoViewModel


class BYOLModel(TwoViewModel):
    """The tower, `visual`, of which the mean of the patches is read, and the heads, `projector` and `predictor`."""

    def head(self, sizes: Sequence[int]) -> nn.Sequential:
        return projection_head(sizes, bias=False)

    predicting_head = head
