"""Forward and backward of the layers of `mmcore.nn`, with gradients of inputs and weights, beside torch's and
transformers' own and a compiled one.

The roofline is the layer's bare products, those of attention without regard to its mask.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.case import Case, dtype_id, time_case
from bench.harness import DTYPE
from bench.measure import assert_agrees, gemm_flops_per_s, relative_error
from bench.peer_layers import (
    DecoupledAttention,
    Distances,
    Flamingos,
    Gated,
    Head,
    Multiway,
    Pooler,
    copy_rows,
    torchs_attention,
    torchs_cross_attention,
)
from bench.peers import load, missing
from mmcore.nn import (
    Attention,
    AttentionalPooler,
    Block,
    CrossAttention,
    GatedCrossAttentionBlock,
    MultiwayAttention,
    MultiwayBlock,
    MultiwayPositions,
    PerceiverResampler,
    PoolingHead,
    PostNormBlock,
    QFormerBlock,
    SwiGLU,
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
    copy_rows(ours.mlp.fc1, theirs.linear1)  # pyright: ignore[reportArgumentType]
    copy_rows(ours.mlp.fc2, theirs.linear2)  # pyright: ignore[reportArgumentType]
    contenders = {"mmcore": Contender(ours, plain), "eager": Contender(theirs, plain)}
    return Layer((torch.randn(rows, 197, 768),), contenders)


def post_norm(rows: int) -> Layer:
    """BERT-base's, of 64 tokens, beside torch.nn.TransformerEncoderLayer."""
    ours = PostNormBlock(768, 12, 3072)
    theirs = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, activation="gelu", batch_first=True)
    for norm in (theirs.norm1, theirs.norm2):
        norm.eps = 1e-12
    theirs.self_attn = torchs_attention(ours.attn)
    copy_rows(ours.mlp.fc1, theirs.linear1)
    copy_rows(ours.mlp.fc2, theirs.linear2)
    contenders = {"mmcore": Contender(ours, plain), "eager": Contender(theirs, plain)}
    return Layer((torch.randn(rows, 64, 768),), contenders)


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


def pooler(rows: int) -> Layer:
    """CoCa ViT-L/14's."""
    ours = AttentionalPooler(768, 256, 8, key_width=1024)
    contenders = {"mmcore": Contender(ours, plain), "eager": Contender(Pooler(ours), plain)}
    return Layer((torch.randn(rows, 256, 1024),), contenders)


def head(rows: int) -> Layer:
    """SigLIP B/16's at 224 pixels."""
    ours = PoolingHead(768, 12, 3072, activation="gelu", norm_eps=1e-6)
    contenders = {"mmcore": Contender(ours, plain), "eager": Contender(Head(ours), plain)}
    return Layer((torch.randn(rows, 196, 768),), contenders)


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


def swiglu(rows: int) -> Layer:
    """DINOv2 g/14's."""
    ours, theirs = SwiGLU(1536, 4096), Gated(1536, 4096)
    copy_rows(ours.w12, theirs.gate, theirs.value)
    copy_rows(ours.w3, theirs.out)
    contenders = {"mmcore": Contender(ours, plain), "eager": Contender(theirs, plain)}
    return Layer((torch.randn(rows, 257, 1536),), contenders)


def multiway(rows: int) -> Layer:
    """BEiT-3's base, of an image and a text."""
    ours, sizes = MultiwayBlock(768, 12, 3072), (197, 64)
    return Layer(
        (torch.randn(rows, sum(sizes), 768),),
        {"mmcore": Contender(ours, lambda m, x: m(x, sizes)), "eager": Contender(Multiway(ours, sizes), plain)},
    )


def multiway_attention(rows: int) -> Layer:
    """BEiT-3's base, decoupled, of an image and a text."""
    ours, sizes = MultiwayAttention(768, 12), (197, 64)
    contenders = {
        "mmcore": Contender(ours, lambda m, x: m(x, sizes)),
        "eager": Contender(DecoupledAttention(ours, sizes), plain),
    }
    return Layer((torch.randn(rows, sum(sizes), 768),), contenders)


def multiway_positions(rows: int) -> Layer:
    """VLMo's base, of an image and a text, for all layers; the input is nothing but what gradients are asked of."""
    ours = MultiwayPositions(14, 40, 12, 12)
    nn.init.normal_(ours.table)
    contenders = {
        "mmcore": Contender(ours, lambda m, x: m(40, True) * x),
        "eager": Contender(Distances(ours, 40), plain),
    }
    return Layer((torch.ones(rows),), contenders)


# by the name of ours: who makes it, of as many rows, and how many on a CPU and on a GPU
LAYERS: Mapping[str, tuple[Callable[[int], Layer], int, int]] = {
    "Attention": (attention, 4, 128),
    "AttentionalPooler": (pooler, 2, 128),
    "Block": (block, 2, 128),
    "CrossAttention": (cross_attention, 4, 100),
    "GatedCrossAttentionBlock": (gated, 1, 64),
    "MultiwayAttention": (multiway_attention, 2, 64),
    "MultiwayBlock": (multiway, 2, 64),
    "MultiwayPositions": (multiway_positions, 1, 1),
    "PerceiverResampler": (resampler, 2, 64),
    "PoolingHead": (head, 4, 128),
    "PostNormBlock": (post_norm, 4, 256),
    "QFormerBlock": (qformer, 2, 100),
    "SwiGLU": (swiglu, 1, 128),
    "shared_keys_values": (keys_values, 1, 100),
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# a CPU's forward is in its forward and backward, and a compilation takes up to half a minute
MODES = ("both",) if DEVICE == "cpu" else ("forward", "both")
COMPILED = ("CrossAttention",) if DEVICE == "cpu" else ("CrossAttention", "QFormerBlock")
# where torch has no such layer, or another way of ours is timed too
OTHERS = {
    "PerceiverResampler": ("transformers",),
    "QFormerBlock": ("transformers",),
    # on a CPU ours is layer by layer
    "shared_keys_values": ("eager",) if DEVICE == "cpu" else ("mmcore, layer by layer", "eager"),
}
PAIRS = [
    (name, contender)
    for name in LAYERS
    for contender in ("mmcore", *OTHERS.get(name, ("eager",)), *(("compile",) if name in COMPILED else ()))
]


def _attention_flops(products: int, *shapes: Any) -> int:
    q, k, _, k2 = shapes[:4]
    num_keys = k[1] + (k2[1] if k2 else 0)
    return 2 * products * max(q[0], k[0]) * q[1] * q[2] * q[3] * num_keys


ATTENTION_FLOPS = {
    torch.ops.mmkernels.attention_fwd: lambda *shapes, **_: _attention_flops(2, *shapes),
    torch.ops.mmkernels.attention_bwd: lambda *shapes, **_: _attention_flops(5, *shapes),
}


@functools.cache
def layer(name: str) -> tuple[tuple[Tensor, ...], dict[str, Contender]]:
    """Leaves, and who is timed."""
    make, on_cpu, on_gpu = LAYERS[name]
    torch.manual_seed(0)
    made = make(on_gpu if DEVICE == "cuda" else on_cpu)
    inputs = tuple(x.to(DEVICE, DTYPE).requires_grad_() for x in made.inputs)
    contenders = {who: found._replace(module=found.module.to(DEVICE, DTYPE)) for who, found in made.contenders.items()}
    if name in COMPILED and (other := contenders.get(OTHERS.get(name, ("eager",))[-1])):
        contenders["compile"] = other._replace(call=torch.compile(other.call, dynamic=False))
    return inputs, contenders


@functools.cache
def upstream(size: int, dtype: torch.dtype) -> Tensor:
    """Without a mean or a slope, of which a LayerNorm would leave little more than rounding."""
    return torch.arange(size, dtype=torch.float64, device=DEVICE).cos().to(dtype)


def total(found: Contender, inputs: tuple[Tensor, ...]) -> Tensor:
    """A loss with another gradient for each element."""
    out = found.call(found.module, *inputs)
    return out.flatten() @ upstream(out.numel(), out.dtype)


@functools.cache
def gold(name: str) -> tuple[Tensor, int]:
    """The first input's gradient by ours in float64, which its tests hold to the published formula; FLOP of it all."""
    inputs, contenders = layer(name)
    ours = contenders["mmcore"]
    wide = ours._replace(module=copy.deepcopy(ours.module).double())
    leaves = tuple(x.detach().double().requires_grad_() for x in inputs)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        total(wide, leaves).backward()
    assert leaves[0].grad is not None
    return leaves[0].grad, counter.get_total_flops()


def gemm_rate() -> float:
    return gemm_flops_per_s(2048, 768, 768, DTYPE, torch.device(DEVICE))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "contender"), PAIRS)
def test_layers(benchmark: Any, device: torch.device, name: str, contender: str, mode: str) -> None:
    inputs, contenders = layer(name)
    if contender not in contenders:
        pytest.skip(f"transformers {missing('transformers')}")
    found = contenders[contender]
    wrt = (*inputs, *(p for p in found.module.parameters() if p.requires_grad))
    (dx,) = torch.autograd.grad(total(found, inputs), inputs[:1])
    expected, flops = gold(name)
    assert_agrees(dx, expected)
    case = Case(
        group=f"{name} {dtype_id(DTYPE)} {'-'.join('x'.join(map(str, x.shape)) for x in inputs)}",
        contender=contender,
        loss=lambda: total(found, inputs),
        wrt=wrt,
        mode=mode,
        floor_s=flops / (3 if mode == "forward" else 1) / gemm_rate(),
        error=lambda: relative_error(dx, expected),
    )
    time_case(benchmark, device, case)
