"""DINO: its losses by the published formulas in float64, its head by torch's weight normalisation, its step, and towers
of published files."""

import argparse
import copy
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from mmcore.data import DataConfig, LoaderSpec
from mmcore.losses import gram_loss, koleo_loss, patch_distillation_loss, sinkhorn_knopp, view_distillation_loss
from mmcore.parts.heads import Centre, PrototypeHead
from mmcore.parts.image_tower import ImageTower
from mmcore.parts.published_vit import TIMM_TOWER
from mmcore.parts.towers import load_pooled, load_tower
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.recipe import Step
from mmcore.systems.dino.model import DINOConfig, DINOModel
from mmcore.systems.dino.recipe import Dino
from mmcore.systems.dino.weights import load_dino
from mmcore.systems.vit.shapes import vit_vision
from mmcore.systems.vit.weights import load_vit, save_vit
from mmcore.weights.layout import Layout
from tests.refusals import refuses
from tests.torchvision_stub import torchvision_or_skip

K, B = 7, 5


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def published_views(student: Tensor, teacher: Tensor, temperature: float, centre: Tensor) -> Tensor:
    """The mean over pairs of a teacher's view and another of the student."""
    targets, found = ((teacher - centre) / temperature).softmax(2), []
    for i, target in enumerate(targets):
        found += [-(target * (x / 0.1).log_softmax(1)).sum(1).mean() for j, x in enumerate(student) if j != i]
    return torch.stack(found).mean()


def test_the_loss_of_views_is_dinos_with_its_gradient() -> None:
    student, teacher, centre = logits(5, B, K).requires_grad_(), logits(2, B, K, seed=1), logits(K, seed=2)
    ours = view_distillation_loss(list(student), list(teacher), 0.1, 0.05, centre)
    theirs = published_views(student, teacher, 0.05, centre)
    assert abs(ours - theirs) < 1e-12
    both = (torch.autograd.grad(x, student)[0] for x in (ours, theirs))
    assert torch.allclose(*both, rtol=0, atol=1e-12)
    refuses("student must have two views or more", view_distillation_loss, list(student[:1]), list(teacher), 0.1, 0.1)


def test_the_loss_of_views_is_lightlys() -> None:
    torchvision_or_skip()
    losses: Any = pytest.importorskip("lightly.loss")
    theirs = losses.DINOLoss(output_dim=K, warmup_teacher_temp=0.05, teacher_temp=0.05, warmup_teacher_temp_epochs=1)
    student, teacher = logits(4, B, K).float(), logits(2, B, K, seed=1).float()
    ours = view_distillation_loss(list(student), list(teacher), 0.1, 0.05, torch.zeros(K))
    torch.testing.assert_close(ours, theirs(list(teacher), list(student), epoch=0), rtol=1e-5, atol=1e-6)


def test_the_loss_of_patches_is_a_mean_over_an_images_patches_and_then_over_images() -> None:
    masked = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    student, teacher = logits(3, 4, K).requires_grad_(), logits(3, 4, K, seed=1)
    each = -((teacher / 0.05).softmax(2) * (student / 0.1).log_softmax(2)).sum(2)
    theirs = ((each * masked).sum(1) / masked.sum(1).clamp(min=1)).mean()
    shares = (1 / masked.double().sum(1, keepdim=True).clamp(min=1)).expand(masked.shape)[masked]
    ours = patch_distillation_loss(student[masked], teacher[masked], shares, 3, 0.1, 0.05)
    assert abs(ours - theirs) < 1e-12
    none = patch_distillation_loss(student[:0, 0], teacher[:0, 0], shares[:0], 3, 0.1, 0.05)
    assert none == 0 and torch.autograd.grad(none, student)[0].abs().max() == 0


def test_koleo_is_its_formula_refuses_a_single_row_and_is_finite_on_equal_ones() -> None:
    x = logits(6, 3).requires_grad_()
    unit = F.normalize(x, dim=1)
    nearest = (unit @ unit.T - 3 * torch.eye(6)).argmax(1)
    theirs = -(nn.PairwiseDistance(2, eps=1e-8)(unit, unit[nearest]) + 1e-8).log().mean()
    assert abs(koleo_loss(x) - theirs) < 1e-12
    both = (torch.autograd.grad(loss, x)[0] for loss in (koleo_loss(x), theirs))
    assert torch.allclose(*both, rtol=0, atol=1e-9)
    equal = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(equal)
    assert loss.isfinite() and torch.autograd.grad(loss, equal)[0].isfinite().all()
    refuses("x must have two rows or more on all ranks, got 1", koleo_loss, x[:1])


def test_sinkhorn_is_its_formula_and_bears_large_logits_and_no_rows() -> None:
    x = logits(9, K)
    shares = (x / 0.1).exp().T
    shares = shares / shares.sum()
    for _ in range(3):
        shares = shares / shares.sum(1, keepdim=True) / K
        shares = shares / shares.sum(0, keepdim=True) / 9
    assert torch.allclose(sinkhorn_knopp(x, 0.1).exp(), shares.T * 9, rtol=1e-10, atol=1e-14)
    large = sinkhorn_knopp(x.float() * 1000, 0.04)
    torch.testing.assert_close(large.exp().sum(1), torch.ones(9))
    assert sinkhorn_knopp(x[:0], 0.1).shape == (0, K)
    refuses("temperature must be above 0, got 0", sinkhorn_knopp, x, 0)


def test_gram_anchoring_is_its_formula() -> None:
    student, teacher = logits(3, 4, 5).requires_grad_(), logits(3, 4, 6, seed=1)
    grams = [y @ y.transpose(1, 2) for y in (F.normalize(x, dim=2) for x in (student, teacher))]
    assert abs(gram_loss(student, teacher) - F.mse_loss(*grams)) < 1e-12  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("learns_norm", [False, True])
def test_the_head_is_the_published_one_and_can_be_copied(learns_norm: bool) -> None:
    ours = PrototypeHead(6, 8, 4, K, learns_norm=learns_norm).double()
    last = nn.utils.parametrizations.weight_norm(nn.Linear(4, K, bias=False)).double()
    last.load_state_dict(
        {f"parametrizations.weight.original{i}": getattr(ours.last_layer, x).detach() for i, x in enumerate("gv")}
    )
    x = logits(B, 6)
    for head in (ours, copy.deepcopy(ours)):
        torch.testing.assert_close(head(x), last(F.normalize(head.mlp(x), dim=1)), rtol=1e-12, atol=1e-12)
    low = copy.deepcopy(ours).bfloat16()
    low.last_layer.g.data = low.last_layer.g.data.float()  # buffers stay under weights in bf16
    assert low(x.bfloat16()).dtype == torch.bfloat16
    names = {"last_layer.v", *(["last_layer.g"] if learns_norm else [])}
    assert {n for n, _ in ours.named_parameters() if n.startswith("last")} == names


def test_a_centre_moves_by_the_mean_of_all_rows_of_a_step() -> None:
    rows, centre = logits(7, K).float(), Centre(K, 0.9)
    centre.add(rows[:3])
    assert not centre.mean.any()
    centre.add(rows[3:])
    centre.update()
    torch.testing.assert_close(centre.mean, 0.1 * rows.mean(0))
    before = centre.mean.clone()
    centre.add(rows[:0])
    centre.update()
    assert torch.equal(centre.mean, before)


def test_a_step_is_the_formula_on_the_models_own_outputs_and_its_batch_is_of_two_sizes() -> None:
    recipe = Dino(data=DataConfig("scattered"), local_crops=3)
    data = recipe.open_data()
    assets = recipe.assets(data)
    torch.manual_seed(0)
    model = recipe.build(assets).double()
    batch = next(recipe.loader(data, assets, LoaderSpec(4, 0, 1, 0))).parts[0]
    assert batch.large.shape == (2, 4, 3, 16, 16) and batch.small.shape == (3, 4, 3, 8, 8)
    centre = Centre(64).double()
    centre.mean.copy_(logits(64))
    teacher = copy.deepcopy(model).eval()
    losses = recipe.loss(model, batch, Step(0, 10, 0, {"teacher": teacher, "centre": centre}))
    large = torch.stack([model.head(model.visual(x)[:, 0]) for x in batch.large])
    small = torch.stack([model.head(model.visual(x)[:, 0]) for x in batch.small])
    expected = published_views(torch.cat([large, small]), large.detach(), 0.04, logits(64))
    assert abs(losses["loss"] - expected) < 1e-9
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())  # positions of small views too
    assert (
        recipe.rules[0].frozen_until == 1_251
        and recipe.small_size(replace(assets.shape.vision, image_size=224, patch_size=16)) == 96
    )
    assert recipe.small_size(replace(assets.shape.vision, image_size=224, patch_size=14)) == 98


def test_residuals_are_dropped_of_the_student_alone() -> None:
    torch.manual_seed(0)
    vision = vit_vision(16, 4, 24, 2, 3, 40, drop_path=0.9, drop_path_uniform=True)
    model = DINOModel(DINOConfig(vision, 8, 8, 8)).train()

    class Engine:
        deepspeed, module, device = model, model, torch.device("cpu")

    held = Dino().companions(Engine)
    views = torch.zeros(2, 6, 3, 16, 16)
    rows: Any = held["teacher"](views).large.flatten(0, 1)
    assert torch.equal(rows, rows[:1].expand_as(rows)) and not rows.requires_grad
    rows = model(views).large.flatten(0, 1)
    assert not torch.equal(rows, rows[:1].expand_as(rows))
    step = Step(5, 10, 0, held)
    held["centre"].add(rows)  # pyright: ignore[reportCallIssue]
    Dino().after_step(Engine, step)
    assert held["teacher"].ema.decay == pytest.approx(1 - 0.002)  # half-way from 0.996 to 1  # pyright: ignore[reportAttributeAccessIssue]


SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 40,
    "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-6,
}  # fmt: skip


def moved(model: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_a_tower_is_transformers_vit_through_files_both_ways_at_other_sizes_too(tmp_path: Path) -> None:
    theirs = moved(ViTModel(ViTConfig(**SIZES), add_pooling_layer=False))
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = ViTModel.from_pretrained(tmp_path / "theirs", add_pooling_layer=False).double()
    ours = load_vit(tmp_path / "theirs").double()
    ours.visual.has_any_size = True
    for size in (16, 8, 24):
        x = torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = theirs(x, interpolate_pos_encoding=True).last_hidden_state
        # ours are resampled in float32
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-9 if size == 16 else 1e-5)
        expected.square().sum().backward()
        ours(x).square().sum().backward()
    torch.testing.assert_close(
        ours.visual.position_embedding.grad,
        theirs.embeddings.position_embeddings.grad[0],  # pyright: ignore[reportOptionalSubscript]
        rtol=1e-5,
        atol=1e-5,
    )
    save_vit(ours.image_tower(), tmp_path / "ours")
    again = ViTModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False)
    assert torch.equal(again.layernorm.weight, theirs.layernorm.weight.float())


def published(vision: VisionConfig, *, mask: str = "mask_token") -> tuple[ViT, dict[str, Tensor]]:
    """A tower, and its weights by the names of the published code."""
    tower = moved(ViT(vision))
    state = Layout(TIMM_TOWER).write(tower.state_dict())
    return tower, {name.replace("mask_token", mask): x for name, x in state.items()}


def test_checkpoints_as_published_are_read_by_their_teacher_and_with_their_head(tmp_path: Path) -> None:
    tower, state = published(vit_vision(16, 4, 64, 2, 1, 40))
    head: Any = nn.Module()
    head.mlp = nn.Sequential(nn.Linear(64, 12), nn.GELU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 4))
    with pytest.warns(FutureWarning):
        head.last_layer = nn.utils.weight_norm(nn.Linear(4, K, bias=False))
    head.last_layer.weight_g.data.fill_(1)  # pyright: ignore[reportCallIssue]
    wrapped = {f"backbone.{n}": x for n, x in state.items()} | {f"head.{n}": x for n, x in head.state_dict().items()}
    whole = {
        "teacher": OrderedDict(wrapped),
        "student": OrderedDict((f"module.{n}", x + 1) for n, x in wrapped.items()),
        "args": argparse.Namespace(arch="vit_small"),
        "epoch": 3,
    }
    torch.save(whole, tmp_path / "full.pth")
    torch.save(state, tmp_path / "tower.pth")
    found, alone = (load_tower(tmp_path / x) for x in ("full.pth", "tower.pth"))
    for name, x in tower.state_dict().items():
        assert torch.equal(found.state[name], x) and torch.equal(alone.state[name], x)
    model = load_dino(tmp_path / "full.pth")
    assert not model.config.learns_norm and model.config.num_prototypes == K
    x = torch.randn(3, 64)
    torch.testing.assert_close(model.head(x), head.last_layer(F.normalize(head.mlp(x), dim=1)))
    student = load_dino(tmp_path / "full.pth", "student")
    assert student.config.learns_norm and torch.equal(student.visual.norm_post.bias, model.visual.norm_post.bias + 1)  # pyright: ignore[reportArgumentType, reportOperatorIssue]
    pooled = load_pooled(tmp_path / "tower.pth")
    shape: Any = pooled.config
    read = ImageTower(shape, None, pooled.pool)
    read.load_state_dict(pooled.state)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(read.features(images), tower(images)[:, 0])
    with pytest.raises(ValueError, match="must have a head of three layers, got none"):
        load_dino(tmp_path / "tower.pth")


def test_flags_that_mean_nothing_are_refused() -> None:
    for name, value, said in (
        ("teacher_temperature", 0.0, "--teacher-temperature must be above 0, got 0.0"),
        ("teacher_momentum", 1.5, r"--teacher-momentum must be in \[0, 1\], got 1.5"),
        ("local_crops", -1, "--local-crops must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(Dino(), **{name: value}).assets(None)  # pyright: ignore[reportArgumentType]


def test_ln_k_is_the_loss_of_outputs_that_are_all_alike() -> None:
    even = torch.zeros(B, K)
    assert view_distillation_loss([even, even], [even, even], 0.1, 0.04) == pytest.approx(math.log(K))
