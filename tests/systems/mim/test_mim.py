"""Masked image modelling against transformers, published names and formulas, in float64; targets and mistakes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BeitConfig,
    BeitForMaskedImageModeling,
    BeitModel,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from mmcore.data import DataConfig, LoaderSpec, open_data
from mmcore.launch import parse
from mmcore.nn import RelativePositions
from mmcore.parts.towers import load_tower
from mmcore.recipe import Step
from mmcore.systems.mim import shapes, weights
from mmcore.systems.mim.hog import hog
from mmcore.systems.mim.model import MaskConfig, Mim, MimConfig
from mmcore.systems.mim.targets import LOSSES
from mmcore.systems.mim.vqkd import Codebook
from mmcore.weights.files import read_folder

NUM, SIDE, SIZE = 3, 4, 16
SIZES: dict[str, Any] = {
    "image_size": SIZE, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 40, "layer_norm_eps": 1e-7, "vocab_size": 11,
}  # fmt: skip
BEITS: dict[str, dict[str, Any]] = {
    "shared": {"use_shared_relative_position_bias": True},
    "layers": {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "plain": {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0},
}


def theirs_at(folder: Path, kind: Any, config: Any) -> Any:
    """A model whose every parameter is moved by seeded noise, read back from its folder, in float64."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    # its eager attention has a softmax in float32
    return kind.from_pretrained(folder, attn_implementation="sdpa").double().eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Images, masks and the places of masked patches."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(NUM, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    masked = torch.rand(NUM, SIDE**2, generator=generator) < 0.4
    return images, masked, masked.flatten().nonzero()[:, 0]


def assert_gradients(theirs: Any, ours: Any, layout: Any, folder: Path) -> None:
    """Their names in memory are not those on disk: gradients travel through a file too."""
    for p in theirs.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    theirs.save_pretrained(folder)
    grads = {n: p.grad for n, p in ours.named_parameters()}
    assert all(x is not None for x in grads.values())
    found = layout.read("test", read_folder("test", folder), grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, found[name], atol=1e-9, rtol=1e-9, msg=name)


def assert_same_files(one: Path, other: Path) -> None:
    before, after = (read_folder("test", x) for x in (one, other))
    assert before.keys() == after.keys() and all(torch.equal(x, after[n]) for n, x in before.items())


def test_simmim_is_vit_for_masked_image_modeling(tmp_path: Path) -> None:
    config = ViTConfig(**SIZES, encoder_stride=4)
    theirs = theirs_at(tmp_path / "theirs", ViTForMaskedImageModeling, config)
    ours = weights.load_simmim(tmp_path / "theirs").double()
    images, masked, places = inputs()
    expected = theirs(images, bool_masked_pos=masked)
    ours.targets = parse("simmim", [], "simmim").pixels(_Shaped(ours.config))
    (predicted,), target = ours(images, masked, places)
    whole = ours(images, masked)
    pixels = whole.view(NUM, SIDE, SIDE, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(NUM, 3, SIZE, SIZE)
    torch.testing.assert_close(pixels, expected.reconstruction, atol=1e-9, rtol=1e-9)
    num = 16 * len(places)
    share = num / (torch.tensor(num) + 1e-5).double()  # theirs divides by this, in float32
    loss = LOSSES["l1"](predicted, target).mean()
    torch.testing.assert_close(loss * share, expected.loss, atol=1e-9, rtol=1e-9)
    (expected.loss / share).backward()
    loss.backward()
    assert_gradients(theirs, ours, weights.SIMMIM_FOLDER.layout, tmp_path / "gradients")
    weights.save_mim(weights.load_simmim(tmp_path / "theirs"), tmp_path / "ours", predicts="pixels")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    assert ViTForMaskedImageModeling.from_pretrained(tmp_path / "ours").config.encoder_stride == 4
    assert not load_tower(tmp_path / "ours").config.has_mask_token


class _Shaped:
    def __init__(self, shape: Any) -> None:
        self.shape = shape


@pytest.mark.parametrize("kind", BEITS)
def test_beit_is_beit_for_masked_image_modeling(tmp_path: Path, kind: str) -> None:
    config = BeitConfig(**SIZES, use_mask_token=True, drop_path_rate=0.0, **BEITS[kind])
    theirs = theirs_at(tmp_path / "theirs", BeitForMaskedImageModeling, config)
    plain = weights.load_beit(tmp_path / "theirs")
    ours = Mim(MimConfig(plain.config.vision, 11)).double()
    ours.load_state_dict(plain.state_dict())
    ours.visual.transformer.activation_checkpointing = kind == "shared"
    images, masked, places = inputs()
    labels = torch.randint(11, (len(places),), generator=torch.Generator().manual_seed(2))
    expected = theirs(images, bool_masked_pos=masked, labels=labels)
    torch.testing.assert_close(ours(images, masked), expected.logits, atol=1e-9, rtol=1e-9)
    (predicted,), _ = ours(images, masked, places)
    loss = LOSSES["cross-entropy"](predicted, labels).mean()
    torch.testing.assert_close(loss, expected.loss, atol=1e-9, rtol=1e-9)
    expected.loss.backward()
    loss.backward()
    assert_gradients(theirs, ours, weights.folder_of("beit", has_head=True).layout, tmp_path / "gradients")
    weights.save_beit(plain, tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    BeitForMaskedImageModeling.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("kind", [BeitModel, Data2VecVisionModel])
def test_towers_are_beit_and_data2vec_models_on_images_of_another_size_too(tmp_path: Path, kind: Any) -> None:
    of_kind: Any = BeitConfig if kind is BeitModel else Data2VecVisionConfig
    options = {"use_mean_pooling": False, "use_shared_relative_position_bias": True}
    theirs = theirs_at(tmp_path / "theirs", kind, of_kind(**SIZES, **options))
    load = weights.load_beit if kind is BeitModel else weights.load_data2vec
    plain = load(tmp_path / "theirs")
    weights.save_beit(plain, tmp_path / "ours", "beit" if kind is BeitModel else "data2vec-vision")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    tower = plain.double().eval().visual
    tower.has_any_size = True
    for size in (SIZE, 24):
        images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(tower(images), theirs(images).last_hidden_state, atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match=r"ViT: kept must be None with relative positions, got some"):
        tower(images, torch.zeros(2, 1, dtype=torch.int64))


def test_a_bias_of_a_pair_of_patches_is_that_of_their_distance() -> None:
    relative = RelativePositions(3, 2)
    torch.nn.init.normal_(relative.table)
    bias = relative()[0]  # [H, T, T]
    assert torch.equal(bias[:, 1, 2], bias[:, 5, 6]) and torch.equal(bias[:, 2, 6], bias[:, 5, 9])
    assert torch.equal(bias[:, 0, 1:].unique(dim=1), relative.table[25][:, None])
    assert torch.equal(bias[:, 1:, 0].unique(dim=1), relative.table[26][:, None])
    assert torch.equal(bias[:, 0, 0], relative.table[27])
    assert relative(5).shape == (1, 2, 26, 26)


# what unilm's class VisionTransformerForMaskedImageModelingCLS holds with both kinds of positions; a block of it
PUBLISHED = (
    "cls_token mask_token pos_embed rel_pos_bias.relative_position_bias_table rel_pos_bias.relative_position_index "
    "patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias lm_head.weight lm_head.bias"
).split()
PUBLISHED_BLOCK = (
    "gamma_1 gamma_2 norm1.weight norm1.bias attn.q_bias attn.v_bias attn.qkv.weight attn.proj.weight attn.proj.bias "
    "norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
).split()


def test_published_files_of_beit_start_a_run_and_are_a_tower(tmp_path: Path) -> None:
    recipe = parse("beit2", ["--num-tokens", "32"], "beit2")
    shape = recipe.shape()
    torch.manual_seed(0)
    model = Mim(shape)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    scaled = Mim(replace(shape, vision=replace(shape.vision, layer_scale=0.1)))
    names = [*PUBLISHED, *(f"blocks.{i}.{n}" for i in range(3) for n in PUBLISHED_BLOCK)]
    names += [f"cls_pt_layers.0.{n}" for n in PUBLISHED_BLOCK]
    index = "rel_pos_bias.relative_position_index"
    assert {*weights.PUBLISHED.write(scaled.state_dict()), index} == set(names)
    state = weights.PUBLISHED.write(model.state_dict())
    state[index] = torch.zeros(17, 17, dtype=torch.int64)
    assert state.keys() == {name for name in names if "gamma" not in name}
    assert state["mask_token"].shape == (1, 1, 64)
    torch.save({"model": state, "epoch": 3}, tmp_path / "beitv2.pth")
    start = replace(recipe, init=tmp_path / "beitv2.pth")
    assets = start.assets(open_data(DataConfig(), seed=0))
    found = start.initial(assets, start.build(assets))
    assert all(torch.equal(found[name], x) for name, x in model.state_dict().items())
    tower = load_tower(tmp_path / "beitv2.pth")
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    again = weights.ViT(tower.config)
    again.load_state_dict(tower.state)
    assert tower.config.num_heads == 4 and tower.config.relative_positions == "shared"
    with pytest.raises(ValueError, match="a file of unilm's or EVA's code must hold"):
        replace(parse("beit", [], "beit"), init=tmp_path / "beitv2.pth").assets(open_data(DataConfig(), seed=0))
    assert again(images).shape == (2, 17, 64)


def test_published_files_of_simmim_hold_an_encoder_and_a_convolution(tmp_path: Path) -> None:
    model = Mim(shapes.SIMMIM["tiny"])
    written = weights.PUBLISHED_SIMMIM.write(model.state_dict())
    state = {n if n.startswith("decoder.") else f"encoder.{n}": x for n, x in written.items()}
    assert state["decoder.0.weight"].shape == (48, 64, 1, 1) and "encoder.rel_pos_bias." in "".join(state)
    torch.save({"model": state}, tmp_path / "simmim.pth")
    found = weights.read_published("test", tmp_path / "simmim.pth", model)
    assert all(torch.equal(found[name], x) for name, x in model.state_dict().items())


def test_hog_is_that_of_the_published_code() -> None:
    # whole numbers: what is reflected at an edge has no gradient across it, to the bit
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).double()
    images[1, :, :8] = 5  # flat
    expected = np.zeros((2, 16, 3, 9, 2, 2))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    for b, c, y, x in np.ndindex(2, 3, 16, 16):
        window = padded[b, c, y : y + 3, x : x + 3]
        across, down = (window * kernel).sum(), (window * kernel.T).sum()
        place = math.floor(math.atan2(across, down) / math.pi * 9) % 9
        expected[b, y // 4 * 4 + x // 4, c, place, y % 4 // 2, x % 4 // 2] += math.hypot(across, down)
    norms = np.sqrt((expected**2).sum(3, keepdims=True)).clip(1e-12)
    found = hog(images, 4, 2)
    torch.testing.assert_close(found, torch.from_numpy((expected / norms).reshape(2, 16, -1)), atol=1e-9, rtol=1e-9)
    assert found.isfinite().all() and (found[1, 0] == 0).all()
    torch.testing.assert_close(hog(-images, 4, 2), found, atol=1e-9, rtol=1e-9)  # the sign is folded


def test_beit2s_second_branch_reads_early_patches_and_the_last_class_token() -> None:
    config = replace(shapes.BEIT2["tiny"], vision=replace(shapes.BEIT2["tiny"].vision, layer_scale=0.5), init_std=0.3)
    model = Mim(config).double()
    images, masked, places = inputs()
    (first, second), target = model(images, masked, places)
    assert target is None
    x, states = model.visual.embed(images, masked=masked), []
    bias = model.visual.relative()  # pyright: ignore[reportOptionalCall]
    for block in model.visual.transformer.blocks:
        x = block(x, bias=bias)
        states.append(x)
    norm, head = model.visual.norm_post, model.head
    torch.testing.assert_close(first, head(norm(states[2]))[:, 1:][masked])
    y = model.class_branch.blocks[0](torch.cat([states[2][:, :1], states[1][:, 1:]], 1), bias=bias)  # pyright: ignore
    torch.testing.assert_close(second, head(norm(y))[:, 1:][masked])
    assert not torch.equal(first, second)


def test_a_codebook_quantises_then_moves_and_is_begun_by_the_first_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    book, x = Codebook(4, 3, 0.9), torch.randn(50, 3, generator=generator, requires_grad=True)
    assert torch.equal(book.eval()(x.detach())[2], torch.zeros(50, dtype=torch.int64)) and not book.has_begun
    book.train()(x.detach())
    assert book.has_begun and len(book(x.detach())[2].unique()) == 4
    before, y = book.codes.clone(), torch.randn(9, 3, generator=generator, requires_grad=True)
    codes, distance, index = book(y)
    unit = F.normalize(y, dim=1)
    assert torch.equal(index, (unit @ before.T).argmax(1))
    torch.testing.assert_close(codes, before[index])
    torch.testing.assert_close(distance, F.mse_loss(unit, before[index]))
    for i, row in enumerate(book.codes):
        own = unit.detach()[index == i]
        moved = F.normalize(0.9 * before[i] + 0.1 * F.normalize(own.mean(0), dim=0), dim=0) if len(own) else before[i]
        torch.testing.assert_close(row, moved)
    # straight through, to the unit vectors
    (codes * torch.arange(3.0)).sum().backward()
    expected = torch.autograd.grad((F.normalize(y, dim=1) * torch.arange(3.0)).sum(), y)[0]
    torch.testing.assert_close(y.grad, expected)
    held = book.codes.clone()
    book.eval()(y.detach())
    assert torch.equal(book.codes, held) and book.bfloat16().codes.dtype == torch.float32


def test_losses_are_the_published_formulas() -> None:
    predicted, target = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosine = -(predicted * target).sum(1) / predicted.norm(dim=1) / target.norm(dim=1)
    torch.testing.assert_close(LOSSES["cosine"](predicted, target), cosine)
    distance = (predicted - target).abs() * 3
    smooth = torch.where(distance < 2, distance**2 / 4, distance - 1).mean(1)
    torch.testing.assert_close(LOSSES["smooth l1"](3 * predicted, 3 * target), smooth)


def test_data2vecs_teacher_averages_normalised_last_states_and_follows() -> None:
    model = Mim(shapes.DATA2VEC["tiny"]).double()
    images, masked, places = inputs()
    states: list[Tensor] = []
    model.visual(images, states=states)
    last = [(x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-5).sqrt() for x in states[-2:]]
    torch.testing.assert_close(model(images, teaches=True), ((last[0] + last[1]) / 2)[:, 1:])
    recipe = parse(
        "data2vec",
        ["--teacher-momentum-start", "0.5", "--teacher-momentum", "0.9", "--teacher-momentum-steps", "4"],
        "data2vec",
    )

    class Engine:
        deepspeed = model

    companions = recipe.companions(Engine())
    teacher: Any = companions["teacher"]
    before = {n: x.clone() for n, x in teacher.teacher.state_dict().items()}
    loss = recipe.loss(model, (images, masked, places), Step(0, 1, 0, companions))["loss"]
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.teacher.training
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    recipe.after_step(None, Step(0, 1, 0, companions))
    for name, x in teacher.teacher.named_parameters():
        torch.testing.assert_close(x, before[name] + 0.5)


def test_tokens_of_dalles_encoder_are_flavas_and_its_images_show_the_same_crop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs: Any = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=4, vocab_size=5, num_blocks_per_group=1))
    theirs.save_pretrained(tmp_path / "dalle")
    recipe = parse("beit", ["--tokenizer", str(tmp_path / "dalle"), "--data", "scattered"], "beit")
    data = recipe.open_data()
    assets = recipe.assets(data)
    assert assets.shape.outputs == 5 and assets.seen.size == 32 and assets.seen.interpolation == "lanczos"
    images, masked, places, seen = next(recipe.loader(data, assets, LoaderSpec(8, 0, 1, 0))).parts[0]
    assert images.shape[-1] == 16 and seen.shape[-1] == 32 and int(masked.sum()) == len(places)
    small = F.interpolate(seen.float(), size=16, mode="area")
    alike = torch.corrcoef(torch.stack([small.flatten(), images.float().flatten()]))[0, 1]
    others = torch.corrcoef(torch.stack([small.flatten(), images.float().roll(1, 0).flatten()]))[0, 1]
    assert alike > 0.95 > others
    expected = theirs.get_codebook_indices(seen.float() / 255 * 0.8 + 0.1).flatten(1)
    assert torch.equal(recipe.target(assets, seen), expected)
    losses = recipe.loss(recipe.build(assets), (images, masked, places, seen), Step(0, 1, 0))
    assert losses["loss"].isfinite()


def test_the_loss_is_the_mean_over_masked_patches_however_many_each_image_has() -> None:
    recipe = parse("maskfeat", [], "maskfeat")
    assets = recipe.assets(None)
    model = recipe.build(assets)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[0, :5], masked[1, 15] = True, True
    found = recipe.loss(model, (images, masked, masked.flatten().nonzero()[:, 0]), Step(0, 1, 0))["loss"]
    error = (model(images, masked) - recipe.target(assets, images)).square().mean(2)
    torch.testing.assert_close(found, error[masked].mean())


def test_masks_are_of_blocks_or_cells_and_reach_every_patch() -> None:
    rng = np.random.default_rng(0)
    cells = MaskConfig("cells", 0.6, cell=2)
    drawn = torch.stack([cells.draw(4, rng) for _ in range(50)])
    assert (drawn.sum(1) == 12).all() and drawn.any(0).all()  # 2.4 of 4 cells, rounded up
    blocks = torch.stack([shapes.BEIT["ViT-B-16"].mask.draw(14, rng) for _ in range(200)])
    assert blocks.sum(1).max() == 75 and blocks.sum(1).min() >= 16 and blocks.any(0).all()
    assert int(256 * shapes.EVA["ViT-g-14"].mask.ratio) == 105
    assert int(196 * shapes.DATA2VEC["ViT-B-16"].mask.ratio) == 120


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("simmim", ["--mask-ratio", "0"], "--mask-ratio must leave and mask patches of tiny: coarse_mask: ratio must"),
        ("beit", ["--mask-ratio", "1"], "--mask-ratio must leave and mask patches of tiny: block_mask: count must"),
        ("beit", ["--num-tokens", "1"], "--num-tokens must be at most"),
        ("beit", ["--tokenizer", "nowhere"], "--tokenizer must be kmeans, a run of vqkd or a folder, got 'nowhere'"),
        ("beit", ["--tokenizer", ".", "--num-tokens", "9"], "--num-tokens has no effect without --tokenizer kmeans"),
        ("eva", [], "eva: --teacher must be given: a run with an image tower, or a folder, got None"),
        ("vqkd", ["--num-tokens", "1"], "vqkd: --num-tokens must be at least 2, got 1"),
        ("data2vec", ["--teacher-momentum", "2"], "--teacher-momentum must be in .0, 1., got 2"),
        ("simmim", ["--init", "no.pth"], "no.pth"),
    ],
)
def test_a_mistake_is_a_sentence(name: str, flags: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(name, flags, name).assets(open_data(DataConfig(), seed=0))
