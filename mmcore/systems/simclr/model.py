"""SimCLR: an image tower, and a projection that its loss reads (arXiv 2002.05709)."""

from functools import partial

from mmcore.parts.heads import projection_head
from mmcore.systems.vit.two_views import TwoViewModel


class SimCLRModel(TwoViewModel):
    """The tower, `visual`, of which the mean of the patches is read, and the head, `projector`."""

    has_joint_statistics = True
    head = staticmethod(partial(projection_head, bias=False, ends_normalised=True))
