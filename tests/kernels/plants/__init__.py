"""Every op's planted bugs."""

from tests.kernels.plants.contrastive import PLANTS as CONTRASTIVE

ALL = {"contrastive": CONTRASTIVE}
