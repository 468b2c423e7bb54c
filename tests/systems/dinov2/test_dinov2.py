"""DINOv2 against transformers' Dinov2Model and Dinov2WithRegistersModel through files, its published names, its step,
and what holds it to an earlier teacher."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from mmcore.data import DataConfig, LoaderSpec
from mmcore.losses import koleo_loss, sinkhorn_knopp
from mmcore.nn import SwiGLU, interpolate_positions
from mmcore.parts.image_tower import ImageTower
from mmcore.parts.published_vit import TIMM_TOWER
from mmcore.parts.towers import load_pooled, load_tower
from mmcore.recipe import Step
from mmcore.systems.dinov2.recipe import Dinov2
from mmcore.systems.dinov2.weights import LAYOUT, load_dinov2, save_dinov2
from mmcore.train.config import RunConfig
from mmcore.weights.files import read_folder
from mmcore.weights.layout import Layout
from tests.torchvision_stub import torchvision_or_skip

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "mlp_ratio": 2, "image_size": 16,
    "patch_size": 4, "layerscale_value": 0.3,
}  # fmt: skip
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain": (Dinov2Config, Dinov2Model, {}),
    "gated": (Dinov2Config, Dinov2Model, {"use_swiglu_ffn": True}),
    "registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel, {"num_register_tokens": 3}),
}


def theirs_at(folder: Path, kind: str) -> Any:
    config, model, options = KINDS[kind]
    torch.manual_seed(0)
    made = model(config(**SIZES, **options))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    made.save_pretrained(folder)
    return model.from_pretrained(folder).double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_is_transformers_through_files_both_ways_with_masks_and_every_gradient(kind: str, tmp_path: Path):
    theirs, ours = theirs_at(tmp_path / "theirs", kind), load_dinov2(tmp_path / "theirs").double()
    ours.visual.has_any_size = True
    generator = torch.Generator().manual_seed(1)
    masked = torch.rand(3, 16, generator=generator) < 0.4
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=generator)
    found, expected = ours.visual(x, masked=masked), theirs(x, bool_masked_pos=masked).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    found.square().sum().backward()
    expected.square().sum().backward()
    grads = {f"visual.{n}": p.grad for n, p in ours.visual.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(ours.parameters()))
    small = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(ours(small), theirs(small).last_hidden_state, rtol=0, atol=1e-5)  # float32 positions
    for p in theirs.parameters():
        p.data = p.grad
    theirs.save_pretrained(tmp_path / "gradients")
    wanted = LAYOUT.read("test", read_folder("test", tmp_path / "gradients"), grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-9, msg=name)
    again = load_dinov2(tmp_path / "theirs")
    save_dinov2(
        again.image_tower()._replace(config=again.config.vision, state=again.visual.state_dict()), tmp_path / "o"
    )
    before, after = (read_folder("test", tmp_path / folder) for folder in ("theirs", "o"))
    assert before.keys() == after.keys() and all(torch.equal(y, after[n]) for n, y in before.items())
    assert type(theirs).from_pretrained(tmp_path / "o").config.layerscale_value == 0.3
    pooled = load_pooled(tmp_path / "o")
    shape: Any = pooled.config
    tower = ImageTower(shape, None, pooled.pool)
    tower.load_state_dict(pooled.state)
    torch.testing.assert_close(tower.double().features(x), ours(x)[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_by_the_published_names_is_the_same_tower(kind: str, tmp_path: Path) -> None:
    theirs_at(tmp_path / "theirs", kind)
    model = load_dinov2(tmp_path / "theirs")
    state = Layout(TIMM_TOWER).write(model.visual.state_dict())
    names = {"blocks.1.attn.qkv.weight", "blocks.0.ls2.gamma", "mask_token", "pos_embed", "norm.bias"}
    names |= {"gated": {"blocks.0.mlp.w12.bias"}, "registers": {"register_tokens"}}.get(kind, {"blocks.0.mlp.fc1.bias"})
    assert names <= state.keys() and state["mask_token"].shape == (1, 64)
    chunked = {n.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): x for n, x in state.items()}
    teacher = {f"backbone.{n}": x for n, x in chunked.items()} | {"dino_head.mlp.0.weight": torch.zeros(2, 64)}
    torch.save({"teacher": teacher}, tmp_path / "training.pth")
    torch.save(state, tmp_path / "tower.pth")
    for file in ("training.pth", "tower.pth"):
        found = load_tower(tmp_path / file)
        assert found.config.has_swiglu == (kind == "gated") and found.config.antialias == (kind == "registers")
        assert all(torch.equal(x, model.visual.state_dict()[n]) for n, x in found.state.items())


def test_a_published_folder_shows_a_crop_of_what_its_positions_are_for(tmp_path: Path) -> None:
    theirs_at(tmp_path / "theirs", "plain")
    processor = {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 10}, "resample": 3,
        "crop_size": {"height": 8, "width": 8}, "image_mean": [0.4, 0.4, 0.4], "image_std": [0.2, 0.2, 0.2],
    }  # fmt: skip
    whole = load_dinov2(tmp_path / "theirs").visual.position_embedding
    (tmp_path / "theirs/preprocessor_config.json").write_text(json.dumps(processor))
    found = load_tower(tmp_path / "theirs")
    assert found.config.image_size == 8 and found.config.image_mean == (0.4, 0.4, 0.4)
    expected = interpolate_positions(whole, 4, antialias=False)  # pyright: ignore[reportArgumentType]
    assert torch.equal(found.state["position_embedding"], expected)


def made(**options: Any) -> tuple[Any, Any, Any]:
    recipe = Dinov2(data=DataConfig("scattered"), local_crops=1, **options)
    data = recipe.open_data()
    assets = recipe.assets(data)
    torch.manual_seed(0)
    return recipe, recipe.build(assets).double(), next(recipe.loader(data, assets, LoaderSpec(6, 0, 1, 0))).parts[0]


def test_a_step_is_the_formula_on_the_models_own_outputs() -> None:
    recipe, model, batch = made(registers=2, gram_weight=2.0)
    teacher, anchor = copy.deepcopy(model), copy.deepcopy(model.visual)
    with torch.no_grad():
        anchor.norm_post.weight.mul_(torch.linspace(0.5, 2, 64))
    losses = recipe.loss(model, batch, Step(0, 10, 0, {"teacher": teacher, "gram": anchor}))
    whole = torch.stack([model.visual(x).detach() for x in batch.large])
    seen = torch.stack([model.visual(x, masked=m) for x, m in zip(batch.large, batch.masked, strict=True)])
    targets = sinkhorn_knopp(teacher.head(whole[:, :, 0]).flatten(0, 1), 0.04).exp().view(2, 6, -1)
    rows = [*model.head(seen[:, :, 0]), model.head(model.visual(batch.small[0])[:, 0])]
    views = [
        -(targets[q] * (x / 0.1).log_softmax(1)).sum(1).mean() for q in (0, 1) for v, x in enumerate(rows) if v != q
    ]
    told, aim = (model.head(x[:, :, 3:][batch.masked]) for x in (seen, whole))
    each = -(sinkhorn_knopp(aim, 0.04).exp() * (told / 0.1).log_softmax(1)).sum(1)
    expected = {
        "views": torch.stack(views).mean(),
        "patches": (each * batch.shares).sum() / 12,
        "koleo": koleo_loss(seen[0, :, 0]) + koleo_loss(seen[1, :, 0]),
        "gram": _grams(seen[:, :, 3:], torch.stack([anchor(x) for x in batch.large])[:, :, 3:]),
    }
    for name, value in expected.items():
        assert abs(losses[name] - value) < 1e-6, name
    total = losses["views"] + losses["patches"] + 0.1 * losses["koleo"] + 2 * losses["gram"]
    assert abs(losses["loss"] - total) < 1e-12
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.visual.parameters())


def _grams(x: Tensor, y: Tensor) -> Tensor:
    one, other = (F.normalize(z, dim=3) @ F.normalize(z, dim=3).transpose(2, 3) for z in (x, y))
    return F.mse_loss(one, other)


def test_the_teacher_of_gram_anchoring_is_taken_at_its_start_and_then_every_so_many_steps() -> None:
    recipe, model, batch = made(gram_weight=1.0, gram_start=2, gram_every=3)

    class Engine:
        deepspeed, module, device = model, model, torch.device("cpu")

    held = recipe.companions(Engine)
    assert "centre" not in held  # assignments need none
    held = {**held, "teacher": held["teacher"]}
    taken = []
    for number in range(8):
        with torch.no_grad():
            model.visual.norm_post.bias.add_(1)
        before = held["gram"].norm_post.bias.clone()
        recipe.after_step(Engine, Step(number, 10, 0, held))
        if not torch.equal(before, held["gram"].norm_post.bias):
            taken.append(number + 1)
    assert taken == [2, 5, 8]
    assert "gram" not in recipe.loss(model, batch, Step(1, 10, 0, held))
    assert "gram" in recipe.loss(model, batch, Step(2, 10, 0, held))


def test_published_rates_of_layers_and_flags_that_mean_nothing() -> None:
    assert next((r.prefix, r.lr_scale) for r in Dinov2().rules) == ("visual.patch_embed", 0.2)
    giant, large = (Dinov2(model=name).shape() for name in ("ViT-g-14", "ViT-L-14"))
    assert giant.vision.has_swiglu and giant.vision.mlp_dim == 4096 and large.patch_prototypes == 131_072
    for options, said in (
        ({"gram_start": 3}, "--gram-weight must be given with --gram-start"),
        ({"run": RunConfig(batch_size=1)}, "--batch-size must be at least 2, which --koleo-weight needs, got 1"),
        ({"koleo_weight": -1.0}, "--koleo-weight must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=said):
            Dinov2(**options).assets(None)  # pyright: ignore[reportArgumentType]


def test_koleo_is_lightlys() -> None:
    torchvision_or_skip()
    losses: Any = pytest.importorskip("lightly.loss")
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(koleo_loss(x), losses.KoLeoLoss()(x))


def test_a_gated_feed_forward_is_the_published_formula() -> None:
    layer = SwiGLU(6, 8)
    x = torch.randn(3, 6)
    a, b = nn.functional.linear(x, layer.w12.weight, layer.w12.bias).split(8, 1)
    torch.testing.assert_close(layer(x), layer.w3(a * a.sigmoid() * b))
