"""Text towers of models that embed captions: their shape, and what all of them are made of."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcore.nn import Linear, Transformer
from mmcore.ops import require
from mmcore.parts.vit import check_tower, tower_summary


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text tower; the defaults are CLIP's."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_dim: int = 2048
    activation: str = "gelu"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = {"vocab_size": self.vocab_size, "context_length": self.context_length}
        sizes |= {"num_layers": self.num_layers, "mlp_dim": self.mlp_dim}
        check_tower("TextConfig", self.width, self.num_heads, self.activation, **sizes)

    @property
    def summary(self) -> str:
        """For the reader."""
        return f"{self.vocab_size} tokens, {self.context_length} a caption, {tower_summary(self)}"


class TextTower(nn.Module):
    """Embeddings, a pre-LN transformer, a norm and a projection; a subclass says in `forward` which state is read."""

    def __init__(self, config: TextConfig, embed_dim: int, *, is_causal: bool, bias: bool) -> None:
        super().__init__()
        self.context_length = config.context_length
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        options = {"is_causal": is_causal, "activation": config.activation, "norm_eps": config.norm_eps}
        self.transformer = Transformer(width, config.num_layers, config.num_heads, config.mlp_dim, **options)
        self.norm_final = nn.LayerNorm(width, eps=config.norm_eps)
        self.proj = Linear(width, embed_dim, bias=bias)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.proj.weight, std=width**-0.5)
        if bias:
            nn.init.zeros_(self.proj.bias)

    def check(self, op: str, tokens: Tensor, *, is_padded: bool = False) -> None:
        """Raises a ValueError unless tokens are int64 [B, T] of at most the context, or of all of it."""
        length = self.context_length
        fits = tokens.ndim == 2 and (length if is_padded else 1) <= tokens.shape[1] <= length
        wanted = f"[B, {length}], padded" if is_padded else f"[B, T] with 1 <= T <= {length}"
        require(op, fits, "tokens must be {}, got {}", wanted, list(tokens.shape))
        require(op, tokens.dtype in (torch.int64, torch.int32), "tokens must be int64, got {}", tokens.dtype)
