"""Every op's planted bugs."""

from tests.kernels.plants.contrastive import PLANTS as CONTRASTIVE
from tests.kernels.plants.sigmoid import PLANTS as SIGMOID

ALL = {"contrastive": CONTRASTIVE, "sigmoid": SIGMOID}
