"""A layer whose attention is shared by the modalities, with a feed-forward for each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmcore.nn.attention import Attention, check_tokens
from mmcore.nn.mlp import MLP
from mmcore.ops import masks, require


class MultiwayBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP_m(LN_m(x)) by the expert of each token's modality m.

    As in VLMo (arXiv:2111.02358) and BEiT-3 (arXiv:2208.10442).

    Args:
        num_experts: as many as there are modalities, which may count "both at once" as one.
    """

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, num_experts: int = 2) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_experts))
        self.mlps = nn.ModuleList(MLP(width, mlp_dim) for _ in range(num_experts))

    def forward(self, x: Tensor, sizes: Sequence[int], mask: masks.Mask | None = None) -> Tensor:
        """All tokens attend to all; each modality has its own feed-forward: [B, T, D].

        Args:
            x: [B, T, D], one modality behind the other.
            sizes: how many tokens each has, T in all; 0 for one that is absent.
            mask: of `mmkernels.masks`, for T queries and T keys.

        Raises:
            ValueError: a wrong shape or mask; sizes that do not add up.
        """
        op, num_experts = "MultiwayBlock", len(self.mlps)
        check_tokens(op, "x", x, self.attn.qkv.in_features)
        fits = len(sizes) == num_experts and sum(sizes) == x.shape[1]
        require(op, fits, "sizes must be {} that add up to {}, got {}", num_experts, x.shape[1], sizes)
        x = x + self.attn(self.norm1(x), mask)
        parts = zip(x.split(list(sizes), 1), self.norms, self.mlps, strict=True)
        return torch.cat([part + mlp(norm(part)) for part, norm, mlp in parts], 1)
