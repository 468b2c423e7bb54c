"""BERT's head: states to words, tied to their embedding."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.nn import Linear
from mmcore.ops import linear_cross_entropy


class TextHead(nn.Module):
    """LN(gelu(W x)) E^T + b with the tokens' embedding E (arXiv:1810.04805)."""

    def __init__(self, embedding: nn.Embedding, *, norm_eps: float = 1e-12) -> None:
        super().__init__()
        vocab_size, width = embedding.weight.shape
        self.transform = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        # the same parameter as the embedding's: ZeRO-3 gathers it for either
        self.weight = embedding.weight
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """[..., D] to logits [..., V]; with int64 labels [...], -100 where there is none, to the sum of the
        cross-entropies, or with "none" to each of them, [N] of all rows."""
        x = self.norm(F.gelu(self.transform(x)))
        if labels is None:
            return F.linear(x, self.weight, self.bias)
        operands = x.flatten(0, -2), self.weight, labels.flatten()
        options = {"label_smoothing": label_smoothing, "reduction": reduction}
        return linear_cross_entropy(*operands, bias=self.bias, **options)


HEAD = {"transform": "transform.dense", "norm": "transform.LayerNorm", "bias": "bias"}
"""Of BertLMPredictionHead's names, for a `TextHead`; the weight is the embedding's."""
