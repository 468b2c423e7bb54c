"""xCLIP's loss by its formula, and what it costs to put everything into one cluster."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcore.losses import global_assignment_losses
from mmcore.recipe import Step
from mmcore.systems.clip.weights import load_clip, save_clip
from mmcore.systems.xclip.model import XCLIP
from mmcore.systems.xclip.recipe import XClip
from mmcore.train.config import RunConfig
from tests.systems.clip.test_weights import small_config


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 9, (6, 5))
    tokens[:, 4] = 9
    return torch.randn(6, 3, 16, 16), tokens


def make() -> XCLIP:
    torch.manual_seed(0)
    return XCLIP(replace(small_config(), text=replace(small_config().text, eos_token_id=9)), 8, 16)


def test_the_loss_is_the_formula_on_the_models_own_outputs() -> None:
    recipe, model = XClip(clusters=8, head_width=16, sharpness=0.25, smoothness=2.0), make()
    features = recipe.features(model, batch())
    losses = recipe.objective(features, [], Step(0, 1, 0))
    image, text, a, b, scale = features
    logits, own = scale * image @ text.T, torch.arange(6)
    contrast = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    p, q = a.softmax(1), b.softmax(1)
    agreement = -(p * q.log() + q * p.log()).sum(1).mean() / 2
    sharp = -(p * p.log() + q * q.log()).sum(1).mean() / 2
    smooth = -sum((x.mean(0) * x.mean(0).log()).sum() for x in (p, q)) / 2
    torch.testing.assert_close(losses["loss"], contrast + agreement + 0.25 * sharp - 2.0 * smooth)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_one_cluster_for_all_costs_log_k() -> None:
    one = torch.tensor([[60.0, 0, 0, 0]]).expand(5, 4)
    even = 60.0 * torch.eye(4)
    constant, spread = (global_assignment_losses(x, x) for x in (one, even))
    assert constant.entropy_of_mean < 1e-6 and abs(spread.entropy_of_mean - math.log(4)) < 1e-6
    assert constant.agreement < 1e-6 and spread.agreement < 1e-6
    with pytest.raises(ValueError, match=r"b must be \[m, K\] as a, got \[5, 3\] beside \[5, 4\]"):
        global_assignment_losses(one, one[:, :3])


def test_an_export_is_a_clip_without_the_heads(tmp_path: Path) -> None:
    model = make()
    XClip().export(_Assets(), model, tmp_path / "out", "hf")  # pyright: ignore[reportArgumentType]
    loaded, own = load_clip(tmp_path / "out").state_dict(), model.state_dict()
    assert not any("head" in name for name in loaded)
    assert all(torch.equal(x, own[name]) for name, x in loaded.items())
    with pytest.raises(ValueError, match="state_dict must hold the model's names"):
        save_clip(model, tmp_path / "all")


class _Assets:
    class tokenizer:
        @staticmethod
        def save(folder: Path) -> None: ...


@pytest.mark.parametrize(("flags", "said"), [
    ({"clusters": 1}, "--clusters must be at least 2, got 1"), ({"head_width": 0}, "--head-width must be at least 1"),
    ({"smoothness": -1.0}, "--smoothness must be at least 0, got -1.0"),
    ({"run": RunConfig(batch_size=1)}, "--batch-size must be at least 2, which BatchNorm needs, got 1"),
])  # fmt: skip
def test_flags_that_mean_nothing_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        XClip(**flags).assets(None)  # pyright: ignore[reportArgumentType]
