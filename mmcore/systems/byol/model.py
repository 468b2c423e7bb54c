"""BYOL: an image tower, a projector and a predictor of the same layers (arXiv 2006.07733)."""

from functools import partial

from mmcore.parts.heads import projection_head
from mmcore.systems.vit.two_views import TwoViewModel


class BYOLModel(TwoViewModel):
    """The tower, `visual`, of which the mean of the patches is read, and the heads, `projector` and `predictor`."""

    head = predicting_head = staticmethod(partial(projection_head, bias=False))
