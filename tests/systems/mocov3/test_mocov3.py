"""MoCo v3 against a transcript of the published modules, in float64, through a file of their names; its patches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTModel

from mmcore.nn import MomentumEncoder
from mmcore.recipe import Step
from mmcore.systems.mocov3.model import PATCHES, MoCoV3Model
from mmcore.systems.mocov3.recipe import MoCoV3
from mmcore.systems.mocov3.weights import LAYOUT, load_mocov3
from mmcore.systems.vit.weights import save_vit
from mmcore.train.optim import make_optimizer, param_groups
from tests.refusals import refuses
from tests.systems.two_views import NARROW, WIDE, WIDTH, engine, moved, small, step, views

HEADS, TAU = 4, 0.2


class Attention(nn.Module):
    """timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        shares = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        return self.proj((shares @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH, 1e-6), Attention(), nn.LayerNorm(WIDTH, 1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 32), "fc2": nn.Linear(32, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def mlp(*sizes: int) -> nn.Sequential:
    """Layers without a bias, each before a BatchNorm, the last of which is plain."""
    layers: list[nn.Module] = []
    for i, size in enumerate(sizes[1:], 1):
        is_last = i == len(sizes) - 1
        layers += [nn.Linear(sizes[i - 1], size, bias=False), nn.BatchNorm1d(size, affine=not is_last)]
        layers += [] if is_last else [nn.ReLU()]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """The published tower and its head, of patches of 4 of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        row, column = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij")
        omega = 10000 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
        angles = [x.flatten()[:, None] * omega for x in (row, column)]
        positions = torch.cat([f(x) for x in angles for f in (torch.sin, torch.cos)], 1)
        self.pos_embed = nn.Parameter(F.pad(positions, (0, 0, 1, 0))[None], requires_grad=False)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, 4, 4)})
        self.blocks, self.norm = nn.ModuleList([Block(), Block()]), nn.LayerNorm(WIDTH, 1e-6)
        self.head = mlp(WIDTH, WIDE, WIDE, NARROW)

    def states(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(x)[:, 0])


class Published(nn.Module):
    """The published model on one process."""

    def __init__(self) -> None:
        super().__init__()
        self.base_encoder, self.momentum_encoder = Encoder(), Encoder()
        self.predictor = mlp(NARROW, WIDE, NARROW)

    def contrast(self, q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / TAU
        return F.cross_entropy(logits, torch.arange(len(q))) * (2 * TAU)

    def forward(self, images: Tensor) -> Tensor:
        q = [self.predictor(self.base_encoder(images[:, i])) for i in range(2)]
        with torch.no_grad():
            k = [self.momentum_encoder(images[:, i]) for i in range(2)]
        return self.contrast(q[0], k[1]) + self.contrast(q[1], k[0])


def published(folder: Path) -> tuple[Any, Path]:
    """Moved by noise, and its file."""
    torch.manual_seed(0)
    model = moved(Published())
    file, state = folder / "vit-s-300ep.pth.tar", {f"module.{name}": x for name, x in model.state_dict().items()}
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {"state": {}}}, file)
    return model, file


def test_a_published_file_loads_with_outputs_loss_and_every_gradient_of_the_original(tmp_path: Path) -> None:
    theirs, file = published(tmp_path)
    ours, images = load_mocov3(file, num_heads=HEADS).double(), views()
    teacher: Any = MomentumEncoder(ours, 0.5)
    teacher.teacher.load_state_dict(load_mocov3(file, teacher=True, num_heads=HEADS).double().state_dict())
    own = ours.state_dict()
    written = LAYOUT.write(own)
    wanted = {n: x for n, x in theirs.state_dict().items() if not n.startswith("momentum_encoder.")}
    assert written.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(written[name], x.to(written[name].dtype), atol=1e-6, rtol=1e-6, msg=name)
    theirs.load_state_dict(written, strict=False)
    followed = LAYOUT.write(teacher.teacher.state_dict())
    base = {n.removeprefix("base_encoder."): x for n, x in followed.items() if n.startswith("base_encoder.")}
    theirs.momentum_encoder.load_state_dict(base)
    loss, expected = MoCoV3().loss(ours, images, step(teacher=teacher))["loss"], theirs(images)
    assert abs(loss - expected) < 1e-9
    loss.backward()
    expected.backward()
    learned = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    grads = LAYOUT.write({name: learned.get(name, 0 * x) for name, x in own.items()})  # pyright: ignore[reportArgumentType]
    for name, p in theirs.named_parameters():
        if p.grad is not None and "patch_embed" not in name:
            assert (p.grad - grads[name]).abs().max() < 1e-9, name
    assert all(ours.get_parameter(name).grad is None for name in PATCHES)


def test_what_was_read_is_exported_with_its_positions(tmp_path: Path) -> None:
    theirs, file = published(tmp_path)
    ours = load_mocov3(file, num_heads=HEADS)
    save_vit(ours.image_tower(), tmp_path / "out")
    exported, images = ViTModel.from_pretrained(tmp_path / "out", attn_implementation="eager"), views()[:, 0]
    expected = theirs.base_encoder.states(images).float()
    torch.testing.assert_close(exported(images.float()).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_other_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    theirs, file = published(tmp_path)
    state = {f"module.{name}": x for name, x in theirs.state_dict().items()}
    stem = {name.replace("patch_embed.proj", "patch_embed.proj.0"): x for name, x in state.items()}
    other = tmp_path / "other.pth.tar"
    for wrong, said in (
        (stem, "file must be of a ViT without a convolutional stem"),
        (
            {n: x for n, x in state.items() if "norm2" not in n},
            "a file of MoCo v3 must hold every weight of the model, missing",
        ),
        ({n: x for n, x in state.items() if "pos_embed" not in n}, "missing base_encoder.pos_embed"),
    ):
        torch.save({"state_dict": wrong}, other)
        refuses(said, load_mocov3, other, num_heads=HEADS)
    refuses("load_mocov3: file must exist", load_mocov3, tmp_path / "nothing.pth.tar")
    refuses("--model has no effect with --init", MoCoV3(init=file, model="ViT-S-16").assets, None)


def test_patches_stay_to_the_bit_without_moments_and_decay_and_begin_as_published() -> None:
    recipe = MoCoV3()
    assets: Any = recipe.assets(None)  # pyright: ignore[reportArgumentType]
    model = recipe.build(assets)
    patches = [model.get_parameter(name) for name in PATCHES]
    before, groups = [x.clone() for x in patches], param_groups(model, recipe.optim, recipe.rules)
    assert not {id(p) for p in patches} & {id(p) for group in groups for p in group["params"]}
    images = torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    recipe.loss(model, images, step())["loss"].backward()
    make_optimizer(groups, recipe.optim).step()
    assert all(torch.equal(x, y) and x.grad is None for x, y in zip(patches, before, strict=True))
    bound = math.sqrt(6 / (3 * 4 * 4 + 64))
    assert 0.95 * bound < before[0].abs().max() <= bound and not before[1].any()
    torch.testing.assert_close(recipe.build(assets).visual.patch_embed.weight, before[0])  # whatever the seed is now
    qkv = MoCoV3Model(assets.shape).visual.transformer.blocks[0].attn.qkv.weight  # pyright: ignore[reportAttributeAccessIssue]
    bound = math.sqrt(6 / (64 + 64))  # of a square: not of (D, 3 D)
    assert 0.95 * bound < qkv.abs().max() <= bound  # pyright: ignore[reportCallIssue]
    assert [shape.vision.num_heads for shape in MoCoV3.shapes.values()] == [4, 12, 12]


def test_the_momentum_of_the_step_is_the_originals() -> None:
    recipe, model = MoCoV3(), small(MoCoV3Model, (WIDE, NARROW), (WIDE, NARROW), positions="sincos").float()
    teacher: Any = recipe.companions(engine(model))["teacher"]
    recipe.after_step(engine(model), Step(2, 10, 0, {"teacher": teacher}))
    # what the fourth step of ten moves its encoder by before it makes the keys
    assert teacher.ema.decay == pytest.approx(1 - 0.5 * (1 + math.cos(math.pi * 3 / 10)) * (1 - 0.99))
