"""Pre-LN transformer blocks, as CLIP's two towers stack them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP weights."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(K)) V, with one fused projection.

    `qkv` holds the rows of q, then k, then v: the order of torch's and open_clip's `in_proj_weight`.
    """

    def __init__(self, width: int, num_heads: int, *, is_causal: bool) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"Attention: num_heads must divide width {width}, got {num_heads}")
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, width: int, mlp_dim: int, *, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP: activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(
        self, width: int, num_heads: int, mlp_dim: int, *, is_causal: bool, activation: str, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads, is_causal=is_causal)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, mlp_dim, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    @torch.no_grad()
    def init_weights(self, num_layers: int) -> None:
        """CLIP's scheme: residual outputs shrink by sqrt(2 * num_layers); biases 0 (arXiv 2103.00020)."""
        width = self.attn.qkv.in_features
        nn.init.normal_(self.attn.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.attn.out.weight, std=(2 * num_layers * width) ** -0.5)
        nn.init.normal_(self.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.fc2.weight, std=(2 * num_layers * width) ** -0.5)
        for layer in (self.attn.qkv, self.attn.out, self.mlp.fc1, self.mlp.fc2):
            nn.init.zeros_(layer.bias)


class Transformer(nn.Module):
    """A stack of pre-LN blocks, bidirectional or causal, with optional activation checkpointing."""

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        *,
        is_causal: bool,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_dim, is_causal=is_causal, activation=activation, norm_eps=norm_eps)
            for _ in range(num_layers)
        )
        for block in self.blocks:
            assert isinstance(block, Block)
            block.init_weights(num_layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x
