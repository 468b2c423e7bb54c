"""A sequence of any length pooled into a fixed number of tokens: CoCa's pooler, SigLIP's head, Flamingo's resampler."""

import torch
from torch import Tensor, nn

from mmcore.nn.attention import check_tokens
from mmcore.nn.cross import CrossAttention
from mmcore.nn.linear import MLP
from mmcore.nn.packing import Packing
from mmcore.ops import masks, require


class AttentionalPooler(nn.Module):
    """attention(LN(queries), LN(x)) with learned queries (CoCa, arXiv:2205.01917).

    Args:
        width: D of the queries and of the result.
        key_width: D of what is pooled; None = `width`.
    """

    def __init__(self, width: int, num_queries: int, num_heads: int, *, key_width: int | None = None) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width if key_width is None else key_width)
        self.attn = CrossAttention(width, num_heads, key_width=key_width)

    def forward(self, x: Tensor, mask: masks.Mask | None = None) -> Tensor:
        """One result a query: [B, L, D_k] to [B, Q, D].

        Args:
            mask: of `mmkernels.masks`, for Q queries and L keys, such as `masks.lengths`.
        """
        check_tokens("AttentionalPooler", "x", x, self.attn.kv.in_features)
        queries = self.query_norm(self.queries)[None]  # [1, Q, D], one for the whole batch
        return self.attn(queries, self.key_norm(x), mask)


class PoolingHead(nn.Module):
    """One state of many by a learned query, y = attention(probe, x), then y + MLP(LN(y)): SigLIP's
    (arXiv:2303.15343)."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, activation: str, norm_eps: float) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(width) * width**-0.5)
        self.attn = CrossAttention(width, num_heads)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, mlp_dim, activation=activation)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """[B, L, D] to [B, D], or [1, N, D] of the rows that `packing` says."""
        if packing is None:
            y = self.attn(self.probe[None, None], x)[:, 0]
        else:
            rows = packing.num_rows
            y = self.attn(self.probe.expand(1, rows, -1), x, packing.seen_by([1] * rows))[0]
        return y + self.mlp(self.norm(y))


class ResamplerBlock(nn.Module):
    """z + attention(LN(z), [LN(media); LN(z)]), then z + MLP(LN(z))."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, head_dim: int | None) -> None:
        super().__init__()
        self.media_norm = nn.LayerNorm(width)
        self.norm1 = nn.LayerNorm(width)
        self.attn = CrossAttention(width, num_heads, head_dim=head_dim, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_dim, bias=False)

    def forward(self, latents: Tensor, media: Tensor) -> Tensor:
        """[B, R, D] beside [B, L, D] to [B, R, D]."""
        x = self.norm1(latents)
        # two segments of keys: the media, by far the longer, are not copied into a concatenation
        keys_values = self.attn.keys_values(self.media_norm(media)), self.attn.keys_values(x)
        latents = latents + self.attn(x, keys_values)
        return latents + self.mlp(self.norm2(latents))


class PerceiverResampler(nn.Module):
    """LN of R learned latents that read the media, and each other, in every layer (Flamingo, arXiv:2204.14198).

    Args:
        width: D of media and latents.
        head_dim: K; None = `width / num_heads`.
        num_frames: the most frames a video has, each with a learned embedding of its time; None = no such
            embeddings.
    """

    def __init__(
        self,
        width: int,
        num_latents: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        *,
        head_dim: int | None = None,
        num_frames: int | None = None,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, width))
        self.times = None if num_frames is None else nn.Parameter(torch.randn(num_frames, width))
        blocks = (ResamplerBlock(width, num_heads, mlp_dim, head_dim=head_dim) for _ in range(num_layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)

    def forward(self, media: Tensor) -> Tensor:
        """[B, R, D], whatever the length of the media.

        Args:
            media: [B, L, D] of an image, or [B, T, P, D] of a video of T frames. Several images of a sample are
                rows of B.
        """
        op = "PerceiverResampler"
        if media.ndim == 4:
            if self.times is not None:
                num_frames, most = media.shape[1], self.times.shape[0]
                require(op, num_frames <= most, "media must have at most {} frames, got {}", most, num_frames)
                media = media + self.times[:num_frames, None]
            media = media.flatten(1, 2)
        check_tokens(op, "media", media, self.latents.shape[1])
        latents = self.latents.expand(media.shape[0], -1, -1)
        for block in self.blocks:
            latents = block(latents, media)
        return self.norm(latents)
