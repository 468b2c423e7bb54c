"""SimCLR's head and loss against the published formulas and lightly's, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.systems.simclr.model import SimCLRModel
from mmcore.systems.simclr.recipe import SimCLR
from mmcore.train.config import RunConfig
from tests.systems.two_views import NARROW, NUM, WIDE, WIDTH, agree, lightly, shared, small, step, torchs, views


def written_out(first: Tensor, second: Tensor) -> Tensor:
    """-log of the partner's share among the 2B - 1 other views, at temperature 0.1."""
    rows = F.normalize(torch.cat([first, second]), dim=1)
    logits = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * NUM).roll(NUM))


@pytest.mark.parametrize("peer", ["formulas", "lightly"])
def test_outputs_loss_and_every_gradient_are_the_originals(peer: str) -> None:
    model: Any = small(SimCLRModel, (WIDE, NARROW))
    if peer == "lightly":
        head = shared(lightly("SimCLRProjectionHead")(WIDTH, WIDE, NARROW), model.projector)
        loss_of = lightly("NTXentLoss")(0.1)
    else:
        head, loss_of = torchs(model.projector), written_out
    images = views()
    read = model.visual(torch.cat([images[:, 0], images[:, 1]]))[:, 1:].mean(1)
    expected = head(read).chunk(2)
    for x, y in zip(model(images), expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-9)
    agree(model, SimCLR().loss(model, images, step())["loss"], loss_of(*expected), but=("visual.class_embedding",))


@pytest.mark.parametrize(("flags", "said"), [
    ({"run": RunConfig(batch_size=1)}, "simclr: --batch-size must be at least 2, which BatchNorm needs, got 1"),
    ({"temperature": 0.0}, "simclr: --temperature must be above 0, got 0.0"),
    ({"views": "source", "view_flip": 0.0}, "--view-flip has no effect with --views source"),
    ({"model": "ViT-B-14"}, "--model must be one of tiny, ViT-S-16, ViT-B-16, ViT-L-16, got 'ViT-B-14'"),
])  # fmt: skip
def test_flags_that_mean_nothing_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SimCLR(**flags).assets(None)  # pyright: ignore[reportArgumentType]
