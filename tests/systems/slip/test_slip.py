"""SLIP's loss and names against the published formulas, and its views."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.data import DataConfig, Preprocess, open_data
from mmcore.losses import nt_xent_loss
from mmcore.recipe import Step
from mmcore.systems.clip.recipe import ClipBatch
from mmcore.systems.slip.model import SLIP
from mmcore.systems.slip.recipe import Slip, SlipBatch
from mmcore.train.config import RunConfig
from tests.systems.clip.test_weights import small_config


def published(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Of rows against [the other view ; its own view without itself], both ways, as SLIP writes SimCLR's loss."""
    losses = []
    for own, other in ((first, second), (second, first)):
        among = (own @ own.T / temperature).masked_fill(torch.eye(len(own), dtype=torch.bool), -torch.inf)
        losses.append(F.cross_entropy(torch.cat([own @ other.T / temperature, among], 1), torch.arange(len(own))))
    return torch.stack(losses).mean()


def test_simclrs_loss_is_slips_with_its_gradient() -> None:
    torch.manual_seed(0)
    first, second = (F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2))
    ours, theirs, views = nt_xent_loss(first, second, 0.1), published(first, second, 0.1), [first, second]
    assert abs(ours - theirs) < 1e-12
    for x, y in zip(torch.autograd.grad(ours, views), torch.autograd.grad(theirs, views), strict=True):
        assert (x - y).abs().max() < 1e-12


def test_the_loss_is_clips_and_simclrs_and_the_heads_names_are_slips() -> None:
    torch.manual_seed(0)
    model = SLIP(replace(small_config(), text=replace(small_config().text, eos_token_id=9)), 16, 6)
    tokens = torch.randint(0, 9, (5, 4))
    tokens[:, 3] = 9
    images, views = torch.randn(5, 3, 16, 16), torch.randn(5, 2, 3, 16, 16)
    recipe = Slip(ssl_scale=0.5)
    features = recipe.features(model, SlipBatch(ClipBatch(images, tokens, [4] * 5), views))
    losses = recipe.objective(features, [], Step(0, 1, 0))
    logits, own = model.logit_scale.exp() * features[0] @ features[1].T, torch.arange(5)
    contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(losses["loss"], contrast + 0.5 * published(features[2], features[3], 0.1))
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    expected = ["layer1", "bn1", "layer2", "bn2", "layer3"]
    assert list(dict.fromkeys(name.split(".")[0] for name, _ in model.image_mlp.named_parameters())) == expected
    assert [m.weight.shape for m in model.image_mlp if hasattr(m, "in_features")] == [(16, 32), (16, 16), (6, 16)]


def test_the_two_views_of_an_image_are_drawn_apart() -> None:
    data = open_data(DataConfig(), seed=0)
    assets: Any = type("Assets", (), {"preprocess": Preprocess(16)})
    assert data.val is not None
    source: Any = data.val.source
    record = source.record(data.val.indices[0])
    views = Slip().views(assets, record, np.random.default_rng(0))
    assert views.shape == (2, 3, 16, 16) and not torch.equal(views[0], views[1])
    assert torch.equal(views, Slip().views(assets, record, np.random.default_rng(0)))


@pytest.mark.parametrize(("flags", "said"), [
    ({"ssl_temperature": 0.0}, "--ssl-temperature must be above 0"), ({"ssl_scale": -1.0}, "--ssl-scale must be at"),
    ({"ssl_hidden": 0}, "--ssl-hidden must be at least 1, got 0"), ({"view_scale": 2.0}, "--view-scale must be above"),
    ({"run": RunConfig(batch_size=1)}, "--batch-size must be at least 2, which BatchNorm needs, got 1"),
])  # fmt: skip
def test_flags_that_mean_nothing_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Slip(**flags).assets(None)  # pyright: ignore[reportArgumentType]
