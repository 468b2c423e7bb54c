"""open_clip itself, where it is installed: its models' weights, and its loop with our losses.

pip install --no-deps open_clip_torch torchvision timm ftfy regex wcwidth
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmcore.losses import ClipLoss, SigLipLoss
from mmcore.systems.clip.weights import load_clip, save_clip
from tests.torchvision_stub import torchvision_or_skip


def open_clip_model(quick_gelu: bool) -> tuple[Any, dict[str, Any]]:
    torchvision_or_skip()
    open_clip: Any = pytest.importorskip("open_clip", exc_type=ImportError)
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    shape = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    torch.manual_seed(0)
    return open_clip.CLIP(**shape, output_dict=True), shape


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(1, 63, (6, 12), generator=generator)
    texts[:, 8] = 63  # the end
    texts[:, 9:] = 0
    return torch.randn(6, 3, 32, 32, generator=generator), texts


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_weights_of_open_clips_own_model_give_its_features(quick_gelu: bool, tmp_path: Path) -> None:
    theirs, shape = open_clip_model(quick_gelu)
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape}))
    ours, (images, texts) = load_clip(tmp_path).eval(), batch()
    expected = theirs.eval()(images, texts)
    torch.testing.assert_close(ours.encode_image(images), expected["image_features"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.encode_text(texts), expected["text_features"], atol=1e-6, rtol=1e-5)
    save_clip(ours, tmp_path / "again", format="open_clip")
    again, _ = open_clip_model(quick_gelu)
    again.load_state_dict(load_file(tmp_path / "again/open_clip_model.safetensors"))
    torch.testing.assert_close(again.eval()(images, texts)["image_features"], expected["image_features"])


def test_a_bias_may_be_a_number_and_a_flag_in_its_place_is_refused() -> None:
    a, b = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    assert ClipLoss()(a, b, 10.0, -3.0) == ClipLoss()(a, b, 10.0) == ClipLoss()(a, b, 10.0, torch.tensor(-3.0))
    with pytest.raises(ValueError, match="logit_bias must be a number, a tensor or None, got True"):
        ClipLoss()(a, b, 10.0, True)  # open_clip 2's output_dict


@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
def test_a_loop_of_open_clips_own_model_goes_the_same_way_with_our_loss(kind: str) -> None:
    ours: Callable[..., Any] = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[kind]()
    ends = []
    for loss in (ours, None):
        model, _ = open_clip_model(quick_gelu=False)
        loss = loss or getattr(pytest.importorskip("open_clip.loss"), kind)()
        optimizer, values = torch.optim.SGD(model.parameters(), lr=0.01), []
        for step in range(4):
            out = model(*batch(step))
            bias = {"logit_bias": torch.tensor(-3.0)} if kind == "SigLipLoss" else {}
            value = loss(out["image_features"], out["text_features"], out["logit_scale"], **bias, output_dict=True)
            value["contrastive_loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(value["contrastive_loss"].item())
        ends.append((values, [p.detach().clone() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], atol=2e-5, rtol=2e-4)
