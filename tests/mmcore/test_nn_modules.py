"""Every attention module under autocast and under the compiler."""

from typing import Any

import pytest
import torch
from torch import nn

from mmcore.nn import (
    Attention,
    AttentionalPooler,
    CrossAttention,
    GatedCrossAttentionBlock,
    MultiwayBlock,
    PerceiverResampler,
    QFormerBlock,
    shared_keys_values,
)
from mmkernels import attention_ref, masks
from tests.mmcore.nn_fixtures import gradients, randn

B, T, L, D, H, F = 2, 6, 8, 32, 2, 48


class TwoReaders(nn.Module):
    """Two layers that read the same states through one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = CrossAttention(D, H), CrossAttention(D, H)

    def forward(self, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        first, second = shared_keys_values(states, (self.first, self.second))
        return self.second(self.first(x, first), second)


def opened(block: GatedCrossAttentionBlock) -> GatedCrossAttentionBlock:
    for gate in (block.attn_gate, block.mlp_gate):
        nn.init.constant_(gate, 0.7)
    return block


def modules() -> dict[str, tuple[nn.Module, int, dict[str, Any]]]:
    """The module, how many sequences it takes, and its other arguments."""
    locations = torch.zeros(B, T, dtype=torch.bool)
    locations[0, 2] = locations[1, 0] = True
    padding = masks.lengths(torch.tensor([6, 3]), T, T)
    itg = masks.qformer_itg(4, torch.tensor([2, 1]), 2)
    qformer = {"image_width": D, "dropout": 0.0, "attention_dropout": 0.0}
    return {
        "attention": (Attention(D, H), 1, {"mask": padding}),
        "causal attention": (Attention(D, H, is_causal=True), 1, {"mask": padding}),
        "cross": (CrossAttention(D, H, num_key_heads=1, qk_norm=True), 2, {}), "shared": (TwoReaders(), 2, {}),
        "gated": (opened(GatedCrossAttentionBlock(D, H, F)), 2, {"mask": masks.media(locations, 2, 4)}),
        "pooler": (AttentionalPooler(D, 3, H), 1, {}), "resampler": (PerceiverResampler(D, 3, 2, H, F), 1, {}),
        "qformer": (QFormerBlock(D, H, F, **qformer), 2, {"num_queries": 4, "mask": itg}),
        "multiway": (MultiwayBlock(D, H, F), 1, {"sizes": (4, 2), "mask": padding}),
    }  # fmt: skip


def results(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and all gradients, with the same weights and inputs for every dtype; autocast for bfloat16."""
    torch.manual_seed(0)
    module, num_inputs, options = modules()[name]
    inputs = [randn(B, n, D) for n in (T, L)[:num_inputs]]
    if dtype == torch.float64:
        module.double()
    else:
        inputs = [x.detach().float().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = module(*inputs, **options)
    return [out, *gradients(out, *inputs, *module.parameters())]


@pytest.mark.parametrize("name", modules())
def test_under_autocast_is_as_close_as_on_attention_that_stores_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gold, found = results(name, torch.float64), results(name, torch.bfloat16)
    for module in ("attention", "cross"):
        monkeypatch.setattr(f"mmcore.nn.{module}.attention", attention_ref)
    for x, ref, exact in zip(found, results(name, torch.bfloat16), gold, strict=True):
        slack = 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (x - exact).abs().max() <= 2 * (ref - exact).abs().max() + slack


@pytest.mark.parametrize("name", modules())
def test_compiles_into_one_graph_with_the_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    module, num_inputs, options = modules()[name]
    inputs = [randn(B, n, D, dtype=torch.float32) for n in (T, L)[:num_inputs]]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, out = module(*inputs, **options), compiled(*inputs, **options)
    torch.testing.assert_close(out, expected)
    leaves = (*inputs, *module.parameters())
    torch.testing.assert_close(gradients(out, *leaves), gradients(expected, *leaves))
