"""Layers as others have them, with the weights of ours: torch's, OpenFlamingo's, open_clip's, BEiT-3's."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.nn import (
    MLP,
    Attention,
    AttentionalPooler,
    CrossAttention,
    GatedCrossAttentionBlock,
    MultiwayAttention,
    MultiwayBlock,
    MultiwayPositions,
    PoolingHead,
)
from mmcore.nn.relative import multiway_places


def copy_rows(linear: nn.Linear, *others: nn.Linear) -> None:
    """The others get the rows of `linear`, one behind the other."""
    sizes = [other.out_features for other in others]
    for kind in ("weight", "bias"):
        rows = getattr(linear, kind)
        if rows is not None:
            for other, part in zip(others, rows.detach().split(sizes), strict=True):
                getattr(other, kind).data.copy_(part)


def torchs_attention(ours: Attention) -> nn.MultiheadAttention:
    width = ours.out.in_features
    theirs = nn.MultiheadAttention(width, ours.num_heads, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    return theirs


def torchs_cross_attention(ours: CrossAttention) -> nn.MultiheadAttention:
    width, key_width = ours.q.in_features, ours.kv.in_features
    theirs = nn.MultiheadAttention(width, ours.num_heads, kdim=key_width, vdim=key_width, batch_first=True)
    key, value = ours.kv.weight.split(width)
    projections = {"q_proj_weight": ours.q.weight, "k_proj_weight": key, "v_proj_weight": value}
    if key_width == width:
        projections = {"in_proj_weight": torch.cat([ours.q.weight, ours.kv.weight])}
    theirs.load_state_dict(
        projections
        | {
            "in_proj_bias": torch.cat([ours.q.bias, ours.kv.bias]),
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    return theirs


def torchs_mlp(ours: MLP) -> nn.Sequential:
    width, hidden = ours.fc1.in_features, ours.fc1.out_features
    theirs = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    copy_rows(ours.fc1, theirs[0])  # pyright: ignore[reportArgumentType]
    copy_rows(ours.fc2, theirs[2])  # pyright: ignore[reportArgumentType]
    return theirs


class Gated(nn.Module):
    """SwiGLU of three layers, as Llama's."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(width, mlp_dim), nn.Linear(width, mlp_dim)
        self.out = nn.Linear(mlp_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.value(x))


class Flamingos(nn.Module):
    """OpenFlamingo's GatedCrossAttentionBlock: all weights stored, and a dense mask of what a token sees."""

    def __init__(self, ours: GatedCrossAttentionBlock, seen: Tensor) -> None:
        super().__init__()
        width, inner = ours.attn.q.in_features, ours.attn.q.out_features
        self.num_heads = ours.attn.num_heads
        self.norm, self.ff_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(ours.attn.kv.in_features, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        hidden = ours.mlp.fc1.out_features
        self.fc1, self.fc2 = (nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False))
        self.attn_gate, self.ff_gate = (nn.Parameter(x.clone()) for x in (ours.attn_gate, ours.mlp_gate))
        for linear, other in (
            (ours.attn.q, self.to_q),
            (ours.attn.kv, self.to_kv),
            (ours.attn.out, self.to_out),
            (ours.mlp.fc1, self.fc1),
            (ours.mlp.fc2, self.fc2),
        ):
            copy_rows(linear, other)
        self.register_buffer("unseen", ~seen)
        self.register_buffer("blind", ~seen.any(-1, keepdim=True))

    def forward(self, x: Tensor, media: Tensor) -> Tensor:
        """[B, T, D] beside [B, L, D_media] to [B, T, D]."""
        q, k, v = self.to_q(self.norm(x)), *self.to_kv(media).chunk(2, -1)
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        logits = (q * q.shape[-1] ** -0.5) @ k.mT
        logits = logits.masked_fill(self.unseen, -torch.finfo(logits.dtype).max)
        weights = (logits - logits.amax(-1, keepdim=True).detach()).softmax(-1).masked_fill(self.blind, 0)
        x = x + self.to_out((weights @ v).transpose(1, 2).flatten(2)) * self.attn_gate.tanh()
        return x + self.fc2(F.gelu(self.fc1(self.ff_norm(x)))) * self.ff_gate.tanh()


class Pooler(nn.Module):
    """open_clip's AttentionalPooler."""

    def __init__(self, ours: AttentionalPooler) -> None:
        super().__init__()
        self.query = nn.Parameter(ours.queries.detach().clone())
        self.attn = torchs_cross_attention(ours.attn)
        self.ln_q = nn.LayerNorm(ours.attn.q.in_features)
        self.ln_k = nn.LayerNorm(ours.attn.kv.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D_k] to [B, Q, D]."""
        x, q = self.ln_k(x), self.ln_q(self.query)
        return self.attn(q.expand(len(x), -1, -1), x, x, need_weights=False)[0]


class Head(nn.Module):
    """SigLIP's pooling head, as transformers has it."""

    def __init__(self, ours: PoolingHead) -> None:
        super().__init__()
        self.probe = nn.Parameter(ours.probe.detach().clone())
        self.attn = torchs_cross_attention(ours.attn)
        self.norm, self.mlp = nn.LayerNorm(len(ours.probe), eps=ours.norm.eps), torchs_mlp(ours.mlp)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] to [B, D]."""
        y = self.attn(self.probe.expand(len(x), 1, -1), x, x, need_weights=False)[0][:, 0]
        return y + self.mlp(self.norm(y))


class DecoupledAttention(nn.Module):
    """BEiT-3's attention as torchscale has it: each modality's projections, and the weights stored."""

    def __init__(self, ours: MultiwayAttention, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes, self.num_heads = list(sizes), ours.num_heads
        for name in ("qkv", "out"):
            layers = nn.ModuleList(nn.Linear(x.in_features, x.out_features) for x in getattr(ours, name))
            layers.load_state_dict(getattr(ours, name).state_dict())
            setattr(self, name, layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""

        def by_part(layers: Any, x: Tensor) -> Tensor:
            return torch.cat([layer(part) for layer, part in zip(layers, x.split(self.sizes, 1), strict=True)], 1)

        q, k, v = by_part(self.qkv, x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
        return by_part(self.out, (weights @ v).transpose(1, 2).flatten(2))


class Distances(nn.Module):
    """VLMo's table of distances, looked up by a stored index, as unilm has it."""

    def __init__(self, ours: MultiwayPositions, num_text: int) -> None:
        super().__init__()
        self.num_layers, self.table = ours.num_layers, nn.Parameter(ours.table.detach().clone())
        self.index = nn.Buffer(torch.from_numpy(multiway_places(ours.side, ours.max_text, num_text, True)))

    def forward(self, scale: Tensor) -> Tensor:
        """[L, H, T, T]."""
        found = F.embedding(self.index, self.table)
        return found.permute(2, 0, 1).unflatten(0, (self.num_layers, -1)) * scale


class Multiway(nn.Module):
    """A block as BEiT-3 has it: torch's attention, and each modality's feed-forward on its part."""

    def __init__(self, ours: MultiwayBlock, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        assert isinstance(ours.attn, Attention)
        self.norm, self.attn = nn.LayerNorm(768), torchs_attention(ours.attn)
        self.norms = nn.ModuleList(nn.LayerNorm(768) for _ in sizes)
        self.experts = nn.ModuleList(torchs_mlp(expert) for expert in ours.mlps)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        y = self.norm(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        parts = zip(x.split(self.sizes, 1), self.norms, self.experts, strict=True)
        return torch.cat([part + expert(norm(part)) for part, norm, expert in parts], 1)
