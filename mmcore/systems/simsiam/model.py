"""SimSiam: an image tower, a projector and a narrow predictor (arXiv 2011.10566)."""

from functools import partial

from mmcore.parts.heads import projection_head
from mmcore.systems.vit.two_views import TwoViewModel


class SimSiamModel(TwoViewModel):
    """The tower, `visual`, of which the mean of the patches is read, and the heads, `projector` and `predictor`."""

    head = staticmethod(partial(projection_head, bias=False, ends_normalised=True, ends_affine=False))
    predicting_head = staticmethod(partial(projection_head, bias=False))
