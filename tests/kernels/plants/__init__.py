"""Every op's planted bugs."""

from tests.kernels.plants.contrastive import PLANTS as CONTRASTIVE
from tests.kernels.plants.token_contrastive import PLANTS as TOKEN_CONTRASTIVE

ALL = {"contrastive": CONTRASTIVE, "token_contrastive": TOKEN_CONTRASTIVE}
