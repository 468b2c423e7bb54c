"""ALIGN: any image module that gives pooled features, and BERT projected to their width (arXiv 2102.05918)."""

import torch
from torch import Tensor, nn

from mmcore.ops import require
from mmcore.parts.bert import BertConfig, BertTower
from mmcore.systems.clip.model import CLIP, TowersConfig


class ALIGN(CLIP):
    """CLIP's towers without a projection of the image, and a temperature, [1], from 1, that similarities are divided
    by; a ValueError where it is not above 0 (on a GPU, a loss that is no number)."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__(config)
        if isinstance(config.text, BertConfig):
            self.text = BertTower(config.text, config.embed_dim, bias=True)
        del self.logit_scale
        self.temperature = nn.Parameter(torch.ones(1))

    def scale(self) -> Tensor:
        """1 / temperature."""
        t = self.temperature.to(torch.promote_types(self.temperature.dtype, torch.float32))
        if t.is_cpu and not torch.compiler.is_compiling():
            require("ALIGN", bool(t > 0), "temperature must stay above 0, got {}: lower --lr", t)
        return torch.where(t > 0, 1 / t, torch.nan)
