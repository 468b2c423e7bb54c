"""What the layers of `mmcore.nn` are measured on and against: shapes of published models, each layer beside what its
users have of torch or transformers, with the same weights."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import load, missing
from mmcore.nn import (
    MLP,
    Attention,
    AttentionalPooler,
    Block,
    CrossAttention,
    GatedCrossAttentionBlock,
    MultiwayBlock,
    PerceiverResampler,
    QFormerBlock,
    shared_keys_values,
)
from mmkernels import masks

Call = Callable[..., Tensor]


class Contender(NamedTuple):
    """A module and how it is called with the inputs."""

    module: nn.Module
    call: Call


class Layer(NamedTuple):
    """Inputs of a layer, and by name who computes it; "mmcore" is ours, "eager" what torch's parts make."""

    inputs: tuple[Tensor, ...]
    contenders: dict[str, Contender]


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


def plain(module: nn.Module, *inputs: Tensor) -> Tensor:
    return module(*inputs)


def attention(rows: int) -> Layer:
    """ViT-B/16's at 224 pixels, beside torch.nn.MultiheadAttention, which runs SDPA."""
    ours = Attention(768, 12)
    theirs = torchs_attention(ours)
    return Layer(
        (torch.randn(rows, 197, 768),),
        {"mmcore": Contender(ours, plain), "eager": Contender(theirs, lambda m, x: m(x, x, x, need_weights=False)[0])},
    )


def block(rows: int) -> Layer:
    """ViT-B/16's, beside torch.nn.TransformerEncoderLayer."""
    ours = Block(768, 12, 3072, is_causal=False, activation="gelu", norm_eps=1e-5)
    theirs = nn.TransformerEncoderLayer(
        768, 12, 3072, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    theirs.self_attn = torchs_attention(ours.attn)
    copy_rows(ours.mlp.fc1, theirs.linear1)
    copy_rows(ours.mlp.fc2, theirs.linear2)
    contenders = {"mmcore": Contender(ours, plain), "eager": Contender(theirs, plain)}
    return Layer((torch.randn(rows, 197, 768),), contenders)


def cross_attention(rows: int) -> Layer:
    """The Q-Former's, beside torch.nn.MultiheadAttention with keys of another width."""
    ours = CrossAttention(768, 12, key_width=1408)
    theirs = torchs_cross_attention(ours)
    return Layer(
        (torch.randn(rows, 32, 768), torch.randn(rows, 257, 1408)),
        {
            "mmcore": Contender(ours, plain),
            "eager": Contender(theirs, lambda m, x, states: m(x, states, states, need_weights=False)[0]),
        },
    )


def keys_values(rows: int) -> Layer:
    """Those of the Q-Former's six layers: together, layer by layer, and of two products a layer."""
    ours = nn.ModuleList(CrossAttention(768, 12, key_width=1408) for _ in range(6))
    theirs = nn.ModuleList(nn.Linear(1408, 768) for _ in range(12))
    for i, layer in enumerate(ours):
        layer.requires_grad_(False).kv.requires_grad_(True)  # pyright: ignore
        copy_rows(layer.kv, theirs[2 * i], theirs[2 * i + 1])  # pyright: ignore[reportArgumentType]
    return Layer(
        (torch.randn(rows, 257, 1408),),
        {
            "mmcore": Contender(ours, lambda m, x: joined([y for kv in shared_keys_values(x, m) for y in kv])),
            "mmcore, layer by layer": Contender(
                ours, lambda m, x: joined([y for layer in m for y in layer.keys_values(x)])
            ),
            "eager": Contender(theirs, lambda m, x: joined([layer(x) for layer in m])),
        },
    )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, which costs each the same."""
    return torch.stack([x.flatten(2) for x in parts]).sum(0)


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


def gated(rows: int) -> Layer:
    """OpenFlamingo's: text among five images, which sees the latest."""
    ours = GatedCrossAttentionBlock(1024, 8, 4096, head_dim=64)
    for gate in (ours.attn_gate, ours.mlp_gate):
        nn.init.constant_(gate, 0.5)
    place = torch.arange(256).expand(rows, -1)
    mask = masks.media(place % 52 == 0, 5, 64)
    theirs = Flamingos(ours, mask.to_dense())
    there: dict[torch.device, masks.Mask] = {}

    def call(module: nn.Module, x: Tensor, media: Tensor) -> Tensor:
        # made once for all blocks
        if x.device not in there:
            there[x.device] = masks.media(place.to(x.device) % 52 == 0, 5, 64)
        return module(x, media, there[x.device])

    return Layer(
        (torch.randn(rows, 256, 1024), torch.randn(rows, 320, 1024)),
        {"mmcore": Contender(ours, call), "eager": Contender(theirs, plain)},
    )


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


def pooler(rows: int) -> Layer:
    """CoCa ViT-L/14's."""
    ours = AttentionalPooler(768, 256, 8, key_width=1024)
    contenders = {"mmcore": Contender(ours, plain), "eager": Contender(Pooler(ours), plain)}
    return Layer((torch.randn(rows, 256, 1024),), contenders)


def resampler(rows: int) -> Layer:
    """A layer of IDEFICS' on the patches of ViT-H/14, beside transformers'."""
    ours = PerceiverResampler(1280, 64, 1, 16, 5120, head_dim=96)
    contenders = {"mmcore": Contender(ours, plain)}
    if missing("transformers") is None:
        config = load("transformers").IdeficsConfig(
            vision_config={"embed_dim": 1280}, perceiver_config={"qk_layer_norms_perceiver": False}
        )
        library = import_module("transformers.models.idefics.perceiver")
        theirs = library.IdeficsPerceiverResampler(config, 1280, 1, 16, 96, 64)
        theirs.latents.data.copy_(ours.latents)
        for layer, (attn, ff) in zip(ours.blocks, theirs.blocks, strict=True):
            ours_: Any = layer
            ff.act = nn.GELU()
            copy_rows(ours_.attn.q, attn.q_proj)
            copy_rows(ours_.attn.kv, attn.k_proj, attn.v_proj)
            copy_rows(ours_.attn.out, attn.output_proj)
            copy_rows(ours_.mlp.fc1, ff.fc)
            copy_rows(ours_.mlp.fc2, ff.c_proj)
        contenders["transformers"] = Contender(theirs, plain)
    return Layer((torch.randn(rows, 257, 1280),), contenders)


def qformer(rows: int) -> Layer:
    """A layer that looks at the image, with a text, under captioning's mask; beside transformers'."""
    queries, length, patches = 32, 32, 257
    num_text = torch.linspace(length // 2, length, rows).long()
    ours = QFormerBlock(768, 12, 3072, image_width=1408, dropout=0.0, attention_dropout=0.0)
    there: dict[torch.device, masks.Mask] = {}

    def call(module: nn.Module, x: Tensor, image: Tensor) -> Tensor:
        # made once for all layers
        if x.device not in there:
            there[x.device] = masks.qformer_itg(queries, num_text.to(x.device), length)
        return module(x, image, num_queries=queries, mask=there[x.device])

    contenders = {"mmcore": Contender(ours, call)}
    if missing("transformers") is None:
        config = load("transformers").Blip2QFormerConfig(
            use_qformer_text_input=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        config._attn_implementation = "eager"
        theirs = import_module("transformers.models.blip_2.modeling_blip_2").Blip2QFormerLayer(config, 0)
        attn, cross = theirs.attention, theirs.crossattention
        assert ours.cross is not None and ours.text_mlp is not None
        copy_rows(ours.attn.qkv, attn.attention.query, attn.attention.key, attn.attention.value)
        copy_rows(ours.attn.out, attn.output.dense)
        copy_rows(ours.cross.q, cross.attention.query)
        copy_rows(ours.cross.kv, cross.attention.key, cross.attention.value)
        copy_rows(ours.cross.out, cross.output.dense)
        for part, first, second in (
            (ours.query_mlp, theirs.intermediate_query, theirs.output_query),
            (ours.text_mlp, theirs.intermediate, theirs.output),
        ):
            copy_rows(part.fc1, first.dense)
            copy_rows(part.fc2, second.dense)
        seen = masks.qformer_itg(queries, num_text, length).to_dense()
        theirs.register_buffer("bias", torch.where(seen, 0.0, -1e4))

        def their_call(module: Any, x: Tensor, image: Tensor) -> Tensor:
            return module(x, attention_mask=module.bias, encoder_hidden_states=image, query_length=queries)

        contenders["transformers"] = Contender(theirs, their_call)
    return Layer((torch.randn(rows, queries + length, 768), torch.randn(rows, patches, 1408)), contenders)


class Multiway(nn.Module):
    """A block as BEiT-3 has it: torch's attention, and each modality's feed-forward on its part."""

    def __init__(self, ours: MultiwayBlock, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.norm, self.attn = nn.LayerNorm(768), torchs_attention(ours.attn)
        self.norms = nn.ModuleList(nn.LayerNorm(768) for _ in sizes)
        self.experts = nn.ModuleList(torchs_mlp(expert) for expert in ours.mlps)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        y = self.norm(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        parts = zip(x.split(self.sizes, 1), self.norms, self.experts, strict=True)
        return torch.cat([part + expert(norm(part)) for part, norm, expert in parts], 1)


def multiway(rows: int) -> Layer:
    """BEiT-3's base, of an image and a text."""
    ours, sizes = MultiwayBlock(768, 12, 3072), (197, 64)
    return Layer(
        (torch.randn(rows, sum(sizes), 768),),
        {"mmcore": Contender(ours, lambda m, x: m(x, sizes)), "eager": Contender(Multiway(ours, sizes), plain)},
    )


# by the name of ours: who makes it, of as many rows, and how many on a CPU and on a GPU
LAYERS: Mapping[str, tuple[Callable[[int], Layer], int, int]] = {
    "Attention": (attention, 4, 128),
    "AttentionalPooler": (pooler, 2, 128),
    "Block": (block, 2, 128),
    "CrossAttention": (cross_attention, 4, 100),
    "GatedCrossAttentionBlock": (gated, 1, 64),
    "MultiwayBlock": (multiway, 2, 64),
    "PerceiverResampler": (resampler, 2, 64),
    "QFormerBlock": (qformer, 2, 100),
    "shared_keys_values": (keys_values, 1, 100),
}
