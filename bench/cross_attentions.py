"""What `mmkernels.attention` is measured on, and against: the cross-attentions of published models."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import FlexKernelOptions, create_block_mask, flex_attention

from bench.interval_rivals import cudnn, flashmask
from bench.peers import load, missing
from bench.spec import Shape
from mmkernels import attention, masks
from mmkernels._cost import Cost
from mmkernels.masks import Intervals, Mask

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
LIBRARIES = ("flash_attn_2", "flash_attn_3", "flash_attn_4", "flex_flash", "cudnn", "flashmask", "xformers")
NUM_DOCUMENTS = 8
# on a GPU an error says that none of them serves a call, where SDPA would go over to eager's products in silence
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@dataclass(frozen=True)
class Workload:
    """A layer of a model.

    Attributes:
        shape: on a GPU, as published.
        scaled: what of it is smaller on a CPU.
        mask: of the shape and the device; None for none.
        dropout_p: of the weights.
        first_keys: where the keys come in two segments, the length of the first.
    """

    shape: Shape
    scaled: Shape
    mask: Callable[[Shape, torch.device], Mask] | None = None
    dropout_p: float = 0.0
    first_keys: int = 0

    def on(self, device: str) -> Shape:
        return self.shape if device == "cuda" else {**self.shape, **self.scaled}


def _shape(batch: int, heads: int, key_heads: int, queries: int, keys: int, width: int) -> Shape:
    return {"B": batch, "H": heads, "Hkv": key_heads, "Lq": queries, "Lk": keys, "K": width}


def _padded(shape: Shape, device: torch.device) -> Mask:
    """From half of the keys to all."""
    seen = torch.linspace(shape["Lk"] // 2, shape["Lk"], shape["B"], device=device).long()
    return masks.lengths(seen, shape["Lq"], shape["Lk"])


def _causal(shape: Shape, device: torch.device) -> Mask:
    return masks.causal(shape["Lq"], shape["Lk"], device=device)


def _media(num_media: int) -> Callable[[Shape, torch.device], Mask]:
    """Images at even distances, the first at the first token; text sees the latest."""

    def mask(shape: Shape, device: torch.device) -> Mask:
        place = torch.arange(shape["Lq"], device=device).expand(shape["B"], -1)
        locations = place % math.ceil(shape["Lq"] / num_media) == 0
        return masks.media(locations, num_media, shape["Lk"] // num_media)

    return mask


def _two_tiles(shape: Shape, device: torch.device) -> Mask:
    """An image of two tiles where four fit, as Llama-3.2-Vision pads them; the text begins with it."""
    seen = torch.tensor([True, True, False, False], device=device).expand(shape["B"], shape["Lq"], 4)
    return masks.tiles(seen, shape["Lk"] // 4)


def _documents(shape: Shape, device: torch.device) -> Mask:
    """Samples packed into a row."""
    ids = torch.arange(shape["Lq"], device=device) // (shape["Lq"] // NUM_DOCUMENTS)
    return masks.documents(ids.expand(shape["B"], -1))


WORKLOADS: Mapping[str, Workload] = {
    "Q-Former": Workload(_shape(100, 12, 12, 32, 257, 64), {"B": 16}),
    "Q-Former ITM": Workload(_shape(300, 12, 12, 64, 64, 64), {"B": 32}, _padded),
    "Q-Former ITG": Workload(_shape(100, 12, 12, 32, 64, 64), {"B": 32}, _causal),
    "Q-Former dropout": Workload(_shape(100, 12, 12, 32, 257, 64), {"B": 16}, dropout_p=0.1),
    "BLIP": Workload(_shape(64, 12, 12, 30, 577, 64), {"B": 8}),
    "LXMERT": Workload(_shape(256, 12, 12, 20, 36, 64), {"B": 32}, _padded),
    "OpenFlamingo": Workload(_shape(64, 8, 8, 256, 320, 64), {"B": 8}, _media(5)),
    "IDEFICS": Workload(_shape(8, 32, 32, 2048, 640, 128), {"B": 1, "H": 8, "Hkv": 8}, _media(10)),
    "resampler": Workload(_shape(128, 16, 16, 64, 321, 96), {"B": 8}, first_keys=257),
    "Llama-3.2-Vision": Workload(_shape(1, 32, 8, 2048, 6404, 128), {"H": 4, "Hkv": 1, "Lq": 1024}, _two_tiles),
    "Llama-3.2-Vision 4 images": Workload(
        _shape(1, 32, 8, 4096, 25616, 128), {"H": 4, "Hkv": 1, "Lq": 1024, "Lk": 6404}, _media(4)
    ),
    "Llama-3.2-Vision tower": Workload(_shape(1, 16, 16, 6432, 6432, 80), {"H": 4, "Hkv": 4, "Lq": 1608, "Lk": 1608}),
    "CoCa pooler": Workload(_shape(256, 8, 8, 256, 256, 96), {"B": 8}),
    "SDXL": Workload(_shape(16, 10, 10, 4096, 77, 64), {"B": 1}),
    "SD1.5": Workload(_shape(16, 8, 8, 4096, 77, 40), {"B": 1}),
    "video resampler": Workload(_shape(1, 16, 16, 64, 73728, 64), {"H": 4, "Hkv": 4, "Lk": 18432}),
    "LLaVA packed": Workload(
        _shape(1, 32, 8, 32768, 32768, 128), {"H": 4, "Hkv": 1, "Lq": 2048, "Lk": 2048}, _documents
    ),
}


def operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Normal leaves `[B, L, H, K]`: q, k, v."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(length: str, heads: str) -> Tensor:
        size = (shape["B"], shape[length], shape[heads], shape["K"])
        x = torch.randn(size, generator=generator, device=device).to(dtype)
        return x.requires_grad_()

    return normal("Lq", "H"), normal("Lk", "Hkv"), normal("Lk", "Hkv")


def seen_share(shape: Shape, mask: Mask | None) -> float:
    """The share of the weights that the mask leaves."""
    if not isinstance(mask, Intervals):
        return 1.0
    return int(mask.num_seen.sum()) / (mask.num_batches * shape["Lq"] * shape["Lk"])


def seen_cost(cost: Cost, share: float) -> Cost:
    return Cost(int(cost.flops * share), cost.bytes_moved, int(cost.exps * share))


def contenders(workload: Workload, shape: Shape, device: torch.device) -> dict[str, Call]:
    """By name, from q, k and v to the result `[B, Lq, H, K]`; a dense mask is made beforehand, and not timed."""
    mask = None if workload.mask is None else workload.mask(shape, device)
    dense = None if mask is None else mask.to_dense()
    dropout_p = workload.dropout_p

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = (_split(k, workload), _split(v, workload)) if workload.first_keys else (k, v)
        return attention(q, *keys, mask=mask, dropout_p=dropout_p)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, *_joined(k, v, workload)))
        groups = q.shape[1] != k.shape[1]
        with sdpa_kernel(FUSED) if q.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, dropout_p=dropout_p, enable_gqa=groups)
        return out.transpose(1, 2)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, 2) for x in _joined(k, v, workload))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if dense is not None:
            logits = logits.masked_fill(~dense, torch.finfo(logits.dtype).min)
        weights = F.dropout(logits.softmax(-1, dtype=torch.float32).to(q.dtype), dropout_p)
        return (weights @ v).transpose(1, 2)

    found: dict[str, Call] = {"mmkernels": ours, "sdpa": sdpa, "eager": eager}
    found["compile"] = torch.compile(eager, dynamic=False, fullgraph=True)
    if device.type == "cuda" and dropout_p == 0:
        found["flex"] = _flex(workload, shape, mask, device)
    for name in LIBRARIES:
        if serves(name, workload, shape) and missing(name) is None:
            found[name] = _library(name, workload, shape, device)
    return found


def _library(name: str, workload: Workload, shape: Shape, device: torch.device) -> Call:
    mask = None if workload.mask is None else workload.mask(shape, device)
    if name == "flex_flash":
        return _flex(workload, shape, mask, device, {"BACKEND": "FLASH"})
    if name in ("cudnn", "flashmask"):
        call = (cudnn if name == "cudnn" else flashmask)(mask, shape, device)
        return lambda q, k, v: call(q, *_joined(k, v, workload))
    return _xformers(workload) if name == "xformers" else _flash_attn(name, workload, shape)


def serves(library: str, workload: Workload, shape: Shape) -> bool:
    """Whether a library has the layer's mask without storing it as a matrix, its dropout and its groups of heads."""
    if library in ("flex_flash", "cudnn"):
        return workload.dropout_p == 0
    if library == "flashmask":
        return workload.dropout_p == 0 and workload.mask in (None, _causal, _documents, _padded)
    if library == "xformers":
        return workload.mask in (None, _causal) and shape["H"] == shape["Hkv"]
    is_known = workload.mask in (None, _causal, _documents)
    return is_known and (library == "flash_attn_2" or workload.dropout_p == 0)


def _split(x: Tensor, workload: Workload) -> tuple[Tensor, Tensor]:
    return x[:, : workload.first_keys], x[:, workload.first_keys :]


def _joined(k: Tensor, v: Tensor, workload: Workload) -> tuple[Tensor, Tensor]:
    """Two segments have to be joined by those who know one."""
    if not workload.first_keys:
        return k, v
    return torch.cat(_split(k, workload), 1), torch.cat(_split(v, workload), 1)


def _flex(
    workload: Workload, shape: Shape, mask: Mask | None, device: torch.device, options: FlexKernelOptions | None = None
) -> Call:
    """FlexAttention, its blocks found beforehand, by Triton or, with the option BACKEND="FLASH", by flash-attn 4."""
    call, block_mask = torch.compile(flex_attention, dynamic=False, fullgraph=True), None
    if isinstance(mask, Intervals):
        ends = [[x.expand(shape["B"], -1) for x in pair] for pair in mask.pairs]

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            hits = [(lo[b, i] <= j) & (j < hi[b, i]) for lo, hi in ends]
            return hits[0] if len(hits) == 1 else hits[0] | hits[1]

        block_mask = create_block_mask(sees, shape["B"], None, shape["Lq"], shape["Lk"], device=str(device))

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, *_joined(k, v, workload)))
        out = call(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return flex


def _flash_attn(name: str, workload: Workload, shape: Shape) -> Call:
    """Packed samples by their offsets, as training codes give them to it; gradients in any order, its default."""
    library, length = load(name), shape["Lq"] // NUM_DOCUMENTS
    options = {"dropout_p": workload.dropout_p} if workload.dropout_p else {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = _joined(k, v, workload)
        if workload.mask is _documents:
            rows, ends = q.shape[0] * NUM_DOCUMENTS, {}
            for side in "qk":
                ends[f"cu_seqlens_{side}"] = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * length
                ends[f"max_seqlen_{side}"] = length
            packed = (x.flatten(0, 1) for x in (q, k, v))
            out = library.flash_attn_varlen_func(*packed, causal=True, **ends, **options)
        else:
            out = library.flash_attn_func(q, k, v, causal=workload.mask is _causal, **options)
        return (out[0] if isinstance(out, tuple) else out).reshape(q.shape)

    return run


def _xformers(workload: Workload) -> Call:
    ops = load("xformers")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = _joined(k, v, workload)
        mask = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask() if workload.mask else None
        return ops.memory_efficient_attention(q, k, v, attn_bias=mask, p=workload.dropout_p)

    return run
