"""iBOT: its loss by the published formula on the model's own outputs, its masks, and its patches' centre."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcore.data import DataConfig, LoaderSpec
from mmcore.losses import patch_distillation_loss
from mmcore.parts.heads import Centre
from mmcore.parts.published_vit import TIMM_TOWER
from mmcore.parts.towers import load_tower
from mmcore.parts.vit import ViT
from mmcore.recipe import Step
from mmcore.systems.ibot.recipe import Ibot
from mmcore.systems.vit.shapes import vit_vision
from mmcore.tasks.agreement import Agrees, agreement
from mmcore.tasks.subject import Subject
from mmcore.weights.layout import Layout
from tests.torchvision_stub import torchvision_or_skip


def made(**options: Any) -> tuple[Any, Any, Any, Any]:
    recipe = Ibot(data=DataConfig("scattered"), local_crops=1, **options)
    data = recipe.open_data()
    assets = recipe.assets(data)
    torch.manual_seed(0)
    model = recipe.build(assets).double()
    return recipe, assets, model, next(recipe.loader(data, assets, LoaderSpec(6, 0, 1, 0))).parts[0]


def test_a_step_is_the_formula_on_the_models_own_outputs() -> None:
    recipe, _, model, batch = made()
    assert batch.masked.any() and not batch.masked.any(2).all()  # images with and without masked patches
    teacher, centres = copy.deepcopy(model).eval(), [Centre(64).double() for _ in range(2)]
    held = {"teacher": teacher, "centre": centres[0], "patch_centre": centres[1]}
    for i, centre in enumerate(centres):
        centre.mean.copy_(torch.randn(64, generator=torch.Generator().manual_seed(i)))
    losses = recipe.loss(model, batch, Step(0, 10, 0, held))
    whole = [model.visual(x).detach() for x in batch.large]
    seen = [model.visual(x, masked=m) for x, m in zip(batch.large, batch.masked, strict=True)]
    small = model.head(model.visual(batch.small[0])[:, 0])
    patches, views = [], []
    for q in (0, 1):
        target = ((teacher.head(whole[q]) - centres[1].mean) / 0.04).softmax(2)[:, 1:]
        each = -(target * (model.head(seen[q]) / 0.1).log_softmax(2)[:, 1:]).sum(2)
        patches.append((each * batch.masked[q]).sum(1) / batch.masked[q].sum(1).clamp(min=1))
        target = ((teacher.head(whole[q][:, 0]) - centres[0].mean) / 0.04).softmax(1)
        for rows in (model.head(seen[1 - q][:, 0]), small):
            views.append(-(target * (rows / 0.1).log_softmax(1)).sum(1))
    assert abs(losses["patches"] - torch.stack(patches).mean()) < 1e-6  # shares are float32
    assert abs(losses["views"] - torch.stack(views).mean()) < 1e-9
    assert abs(losses["loss"] - losses["views"] - losses["patches"]) < 1e-12
    losses["loss"].backward()
    assert model.visual.mask_token.grad.any()
    before = centres[1].mean.clone()
    centres[1].update()  # by all patches, masked or not
    expected = torch.cat([teacher.head(x[:, 1:]).flatten(0, 1) for x in whole]).mean(0)
    torch.testing.assert_close(centres[1].mean, 0.9 * before + 0.1 * expected)


def test_the_loss_of_patches_is_lightlys() -> None:
    torchvision_or_skip()
    losses: Any = pytest.importorskip("lightly.loss")
    theirs = losses.IBOTPatchLoss(output_dim=5, teacher_temp=0.05, student_temp=0.1)
    masked = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    student, teacher = torch.randn(2, int(masked.sum()), 5, generator=torch.Generator().manual_seed(1))
    shares = (1 / masked.sum(1, keepdim=True).clamp(min=1)).expand(masked.shape)[masked]
    ours = patch_distillation_loss(student, teacher, shares, 4, 0.1, 0.05)
    torch.testing.assert_close(ours, theirs(teacher, student, masked.view(4, 3, 3)), rtol=1e-5, atol=1e-6)


def test_masks_are_of_the_rate_and_the_ratio_that_are_asked_for() -> None:
    recipe, assets, _, batch = made(mask_rate=1.0, mask_ratio=(0.25, 0.25))
    assert batch.masked.shape == (2, 6, 16) and batch.masked.any(2).all() and batch.masked.sum(2).max() <= 4
    assert torch.equal(batch.places, batch.masked.flatten().nonzero()[:, 0])
    assert batch.shares.sum().item() == pytest.approx(12)
    none: Tensor = made(mask_rate=0.0)[3].places
    assert none.numel() == 0
    loss = recipe.loss(recipe.build(assets), made(mask_rate=0.0)[3], Step(0, 1, 0))
    assert loss["patches"] == 0
    for options in ({"mask_rate": 2.0}, {"mask_ratio": (0.5, 0.1)}, {"patch_weight": -1.0}):
        with pytest.raises(ValueError, match=f"--{next(iter(options)).replace('_', '-')} must be"):
            Ibot(**options).assets(None)  # pyright: ignore[reportArgumentType]


def test_a_published_file_with_its_own_name_of_the_mask_token_is_read(tmp_path: Path) -> None:
    tower = ViT(vit_vision(16, 4, 64, 1, 1, 40, has_mask_token=True))
    state = Layout(TIMM_TOWER).write(tower.state_dict())
    state["masked_embed"] = state.pop("mask_token")
    torch.save({"state_dict": {f"module.backbone.{n}": x for n, x in state.items()}}, tmp_path / "ibot.pth")
    found = load_tower(tmp_path / "ibot.pth")
    assert "mask_token" not in found.state and not found.config.has_mask_token
    assert torch.equal(found.state["position_embedding"], tower.position_embedding)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("is_told", [True, False])
def test_agreement_is_one_where_masked_patches_are_known_and_at_most_zero_where_they_are_not(is_told: bool) -> None:
    recipe, assets, _, _ = made()

    def logits(images: Tensor, masked: Tensor | None = None) -> Tensor:
        bright = images.float().mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)).flatten(1)  # [B, P]
        kinds = torch.bucketize(bright, torch.tensor([40.0, 90.0]))
        return torch.eye(3)[kinds if masked is None or is_told else torch.ones_like(kinds)]

    class Knows:
        pictures = staticmethod(recipe.pictures)

        @staticmethod
        def agrees(*_: Any) -> Agrees:
            return Agrees(assets.preprocess, lambda rng: recipe.mask(assets, rng), logits)

    value = agreement(Subject(Knows, assets, None, recipe.open_data(), torch.device("cpu")))
    assert value == pytest.approx(1) if is_told else value <= 0
