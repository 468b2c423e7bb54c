"""Attention of libraries that are not installed, by their recorded signatures: what we pass to each, and no more."""

from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from bench.spec import OpSpec
from mmkernels import attention_ref, masks
from mmkernels.attention import backends, libraries
from mmkernels.attention.libraries import LIBRARIES


def _math(q: Tensor, k: Tensor, v: Tensor, scale: Any, causal: bool, slopes: Tensor | None = None) -> Any:
    mask = masks.causal(q.shape[1], k.shape[1]) if causal else None
    return attention_ref(q, k, v, mask=mask, scale=scale, alibi_slopes=slopes)


# as flash-attn 2.8.3 has it, the hopper folder and flash-attn-4 in August 2026, and xformers 0.0.35: what we pass
def flash_attn_2(q, k, v, *, softmax_scale, causal, alibi_slopes=None, deterministic):
    assert deterministic
    assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
    return _math(q, k, v, softmax_scale, causal, alibi_slopes)


def flash_attn_3(q, k, v, *, softmax_scale, causal, deterministic):
    assert deterministic
    return _math(q, k, v, softmax_scale, causal)


def varlen(attend: Any) -> Any:
    """The same of sequences behind one another."""

    def function(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k)
        lengths = [x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
        assert [max(x) for x in lengths] == [max_seqlen_q, max_seqlen_k] and min(map(min, lengths)) >= 0
        assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
        parts = zip(*(x.split(n) for x, n in zip((q, k, v), (lengths[0], *lengths[1:] * 2), strict=True)), strict=True)
        found = [attend(*(x[None] for x in part), **options) for part in parts]
        return torch.cat([x[0] if isinstance(x, tuple) else x for x in found], 1)[0]

    return function


# nvidia-cudnn-frontend's cudnn.flex_attention, September 2026
def create_mask_plan(mask_func, q, k, v):
    assert mask_func.dtype == torch.int32 and mask_func.is_contiguous() and mask_func.ndim == 3
    assert mask_func.shape[::2] == (1, q.shape[0] * q.shape[1]) and mask_func.shape[1] % 2 == 1
    assert (mask_func.diff(dim=1) >= 0).all() and mask_func.min() >= 0 and mask_func.max() <= k.shape[1]
    first, *rest = mask_func[0].unflatten(1, q.shape[:2])
    places = torch.arange(k.shape[1])
    seen = places < first[..., None]
    for lo, hi in zip(rest[0::2], rest[1::2], strict=True):
        seen = seen | (lo[..., None] <= places) & (places < hi[..., None])
    return masks.dense(seen)


def flex_attn_func(q, k, v, *, mask_plan, softmax_scale, deterministic):
    assert deterministic and all(x.stride(-1) == 1 for x in (q, k, v))
    return attention_ref(q, k, v, mask=mask_plan, scale=softmax_scale)


# FlashMask's port to torch, flashmask_interface.py of PaddlePaddle's flash-attention, 2026
def flashmask_attention(query, key, value, startend_row_indices, *, causal, softmax_scale):
    assert startend_row_indices.dtype == torch.int32 and not causal
    assert startend_row_indices.shape == (key.shape[0], 1, key.shape[1], 2)
    end, begin = startend_row_indices.unbind(3)  # of rows, below and above which a key is hidden
    places = torch.arange(query.shape[1])[:, None]
    seen = (begin[:, :, None] <= places) & (places < end[:, :, None])
    return attention_ref(query, key, value, mask=masks.dense(seen), scale=softmax_scale)


def flash_attn_4(q, k, v, *, softmax_scale, causal, deterministic):
    return flash_attn_3(q, k, v, softmax_scale=softmax_scale, causal=causal, deterministic=deterministic), None


def memory_efficient_attention(query, key, value, *, attn_bias, p, scale):
    assert p == 0.0 and query.shape[2] == key.shape[2]
    return _math(query, key, value, scale, isinstance(attn_bias, LowerTriangularFromBottomRightMask))


class LowerTriangularFromBottomRightMask:
    pass


# what is not installed
FAKES: dict[str, dict[str, Any]] = {
    **{
        module: {"flash_attn_func": function, "flash_attn_varlen_func": varlen(function)}
        for module, function in (
            ("flash_attn.flash_attn_interface", flash_attn_2),
            ("flash_attn_interface", flash_attn_3),
            ("flash_attn.cute", flash_attn_4),
        )
    },
    "cudnn.flex_attention": {"create_mask_plan": create_mask_plan, "flex_attn_func": flex_attn_func},
    "flashmask_interface": {"flashmask_attention": flashmask_attention},
    "xformers.ops": {
        "memory_efficient_attention": memory_efficient_attention,
        "fmha": SimpleNamespace(
            attn_bias=SimpleNamespace(LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask)
        ),
    },
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """All libraries, as fakes that run anywhere in any dtype."""
    found = {}
    for name, members in FAKES.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(members)
    found[libraries.FLEX] = flex_attention
    # uncompiled it computes on a CPU what the blocks' `sees` says, in forward alone
    monkeypatch.setattr(libraries, "_compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(libraries, "_FOUND", found)
    anywhere = {
        name: replace(library, only=None, dtypes=libraries.SINGLE) if library.module else library
        for name, library in LIBRARIES.items()
    }
    monkeypatch.setattr(backends, "LIBRARIES", anywhere)


def asking(spec: OpSpec, backend: str) -> OpSpec:
    return replace(spec, op=partial(spec.op, backend=backend))
