"""The options of the shared ViT: class token, fixed positions, final norm, patches that are kept."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEModel

from mmcore.nn import sincos_positions
from mmcore.parts.vit import VisionConfig, ViT

SIZES: Any = {"image_size": 16, "patch_size": 4, "width": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


def tower(**options: Any) -> ViT:
    torch.manual_seed(0)
    return ViT(VisionConfig(**SIZES, **options)).double()


def images(num: int = 3) -> Tensor:
    return torch.randn(num, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_fixed_positions_are_maes_and_learn_nothing():
    sizes: Any = {"hidden_size": 24, "num_attention_heads": 3, "image_size": 20, "patch_size": 4}
    theirs = ViTMAEModel(ViTMAEConfig(**sizes, num_hidden_layers=1)).embeddings
    # transformers 5.23 leaves zeros where a model is made from its configuration: the convolution has this mark by then
    theirs.patch_embeddings.projection._is_hf_initialized = False  # pyright: ignore
    theirs.initialize_weights()
    expected = theirs.position_embeddings[0]
    assert expected.any()
    torch.testing.assert_close(sincos_positions(24, 25), expected, atol=1e-6, rtol=0)
    assert torch.equal(sincos_positions(24, 25, num_prefix=0), sincos_positions(24, 25)[1:])
    vit = tower(positions="sincos")
    assert "position_embedding" in vit.state_dict() and "position_embedding" not in dict(vit.named_parameters())


@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize("has_norm_pre", [True, False])
def test_all_patches_kept_are_those_of_the_whole_image_in_the_order_that_was_asked_for(has_class_token, has_norm_pre):
    vit = tower(has_class_token=has_class_token, has_norm_pre=has_norm_pre)
    x, first = images(), int(has_class_token)
    order = torch.stack([torch.randperm(16) for _ in x])
    whole, found = vit(x), vit(x, order)
    assert whole.shape == (3, 16 + first, 24)
    torch.testing.assert_close(found[:, :first], whole[:, :first])
    torch.testing.assert_close(found[:, first:], whole[:, first:].gather(1, order[:, :, None].expand(-1, -1, 24)))


@pytest.mark.parametrize("has_class_token", [True, False])
def test_what_is_not_kept_is_not_read(has_class_token: bool):
    vit, x = tower(has_class_token=has_class_token), images().requires_grad_()
    found = vit(x, torch.tensor([[0, 5], [15, 1], [2, 3]]))
    assert found.shape == (3, 2 + has_class_token, 24)
    found.square().sum().backward()
    assert x.grad is not None
    patches = x.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1)  # [B, P]
    assert [row.nonzero()[:, 0].tolist() for row in patches] == [[0, 5], [1, 15], [2, 3]]


def test_the_final_norm_is_of_every_state_or_of_those_that_are_pooled():
    plain, normed, x = tower(), tower(has_final_norm=True), images()
    normed.load_state_dict(plain.state_dict() | normed.norm_post.state_dict(prefix="norm_post."))
    expected = torch.nn.functional.layer_norm(plain(x), (24,))
    torch.testing.assert_close(normed(x), expected)
    torch.testing.assert_close(normed(x, pool=lambda states: states[:, 0]), expected[:, 0])


@pytest.mark.parametrize(("kept", "got"), [
    (torch.zeros(3, 0, dtype=torch.int64), r"torch.int64 \[3, 0\]"),
    (torch.zeros(2, 4, dtype=torch.int64), r"torch.int64 \[2, 4\]"),
    (torch.zeros(3, 16, dtype=torch.bool), r"torch.bool \[3, 16\]"),
])  # fmt: skip
def test_kept_patches_that_fit_no_image_are_refused(kept: Tensor, got: str):
    with pytest.raises(
        ValueError, match=rf"ViT: kept must be int64 \[3, K\] of at least one patch an image, got {got}"
    ):
        tower()(images(), kept)


def test_impossible_positions_are_refused():
    with pytest.raises(ValueError, match=r"positions must be one of \('learned', 'sincos', 'none'\), got 'rope'"):
        tower(positions="rope")
    with pytest.raises(ValueError, match="width must be a multiple of 4, got 6"):
        sincos_positions(6, 4)
    with pytest.raises(ValueError, match="num_patches must be a square number, got 5"):
        sincos_positions(8, 5)
