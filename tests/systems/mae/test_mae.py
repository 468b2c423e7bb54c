"""MAE against transformers' ViTMAEForPreTraining, in float64, through files both ways; its masks and its pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mmcore.data import DataConfig, LoaderSpec, open_data
from mmcore.launch import parse
from mmcore.parts.pixels import masked_error, patchify, unpatchify
from mmcore.parts.towers import load_tower
from mmcore.systems.mae.model import MAE
from mmcore.systems.mae.shapes import MAE_CONFIGS
from mmcore.systems.mae.weights import LAYOUT, load_mae, save_mae
from mmcore.systems.mae.weights import PUBLISHED as PUBLISHED_LAYOUT
from mmcore.weights.files import read_folder
from tests.mmcore.data_fixtures import write_vqa

RATIO, NUM, PATCHES = 0.6, 3, 16
SIZES: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 40, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 28, "mask_ratio": RATIO, "layer_norm_eps": 1e-7,
}  # fmt: skip


def theirs_at(folder: Path, **options: Any) -> Any:
    """A model whose every parameter, fixed positions too, is moved by seeded noise, and its folder."""
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    # its eager attention has a softmax in float32
    return ViTMAEForPreTraining.from_pretrained(folder, attn_implementation="sdpa").double()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Images, noise for transformers, and the patches that are visible by it."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(NUM, 3, 16, 16, dtype=torch.float64, generator=generator)
    noise = torch.rand(NUM, PATCHES, generator=generator)
    return images, noise, noise.argsort(1)[:, : int(PATCHES * (1 - RATIO))].sort(1).values


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_outputs_loss_and_every_gradient_are_transformers(tmp_path: Path, norm_pix_loss: bool, recomputes: bool):
    theirs = theirs_at(tmp_path / "theirs", norm_pix_loss=norm_pix_loss)
    ours = load_mae(tmp_path / "theirs").double()
    for part in (ours.visual, ours.decoder):
        part.transformer.activation_checkpointing = recomputes
    images, noise, kept = inputs()
    expected = theirs(images, noise=noise)
    predicted, target = ours(images, kept)
    total, count = masked_error(predicted, target, kept)
    loss = total / count
    torch.testing.assert_close(predicted, expected.logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(loss, expected.loss, atol=1e-9, rtol=1e-9)
    expected.loss.backward()
    loss.backward()
    files = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert len(files) == len(list(ours.parameters()))
    # their names in memory are not those on disk: gradients travel through a file too
    for p in theirs.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    theirs.save_pretrained(tmp_path / "gradients")
    buffers = {n: torch.zeros_like(x) for n, x in ours.named_buffers()}
    found = LAYOUT.read("test", read_folder("test", tmp_path / "gradients"), files | buffers)
    for name, grad in files.items():
        torch.testing.assert_close(grad, found[name], atol=1e-9, rtol=1e-9, msg=name)


def test_files_go_both_ways_bit_by_bit(tmp_path: Path):
    theirs_at(tmp_path / "theirs", norm_pix_loss=True)
    save_mae(load_mae(tmp_path / "theirs"), tmp_path / "ours")
    before, after = (read_folder("test", tmp_path / x) for x in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(x, after[n]) for n, x in before.items())
    again = ViTMAEForPreTraining.from_pretrained(tmp_path / "ours")
    assert again.config.layer_norm_eps == 1e-7 and again.config.norm_pix_loss and again.config.mask_ratio == RATIO
    tower = load_tower(tmp_path / "ours")
    assert tower.config.has_final_norm and torch.equal(tower.state["norm_post.bias"], before["vit.layernorm.bias"])


def test_other_models_are_refused_by_name(tmp_path: Path):
    theirs_at(tmp_path / "biased", qkv_bias=False)
    with pytest.raises(ValueError, match=r"load_mae: config.json must have qkv_bias True, got False"):
        load_mae(tmp_path / "biased")
    with pytest.raises(
        ValueError, match=r"MAEConfig: mask_ratio must mask and leave at least one of 16 patches, got 1"
    ):
        parse("mae", ["--mask-ratio", "1"], "mae").assets(None)


def test_the_published_shapes_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        counts = {n: sum(p.numel() for p in MAE(c).visual.parameters()) for n, c in MAE_CONFIGS.items()}
    # of ViT-B, L, H without a head, whose positions learn nothing
    assert [round(counts[n] / 1e6) for n in ("ViT-B-16", "ViT-L-16", "ViT-H-14")] == [86, 303, 630]


def test_the_target_is_normalised_by_the_unbiased_variance_of_each_patch():
    images = inputs()[0]
    patches = patchify(images, 4)
    assert torch.equal(patches[1, 6].view(4, 4, 3), images[1, :, 4:8, 8:12].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 4), images)
    config = parse("mae", ["--norm-pix", "True"], "mae").assets(None).shape
    torch.testing.assert_close(config.targets(images).var(2), torch.ones(NUM, PATCHES).double(), rtol=1e-4, atol=0)
    assert config.targets(torch.zeros_like(images)).abs().max() == 0


def test_weights_in_bf16_meet_fixed_positions_and_targets_in_float32():
    model, kept = MAE(MAE_CONFIGS["tiny"]), torch.arange(4).expand(2, 4)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    predicted, target = model(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), kept)
    assert predicted.dtype == torch.bfloat16 and target.dtype == torch.float32


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_picture_of_a_reconstruction_knows_nothing_of_masked_pixels(norm_pix: bool):
    recipe = parse("mae", ["--norm-pix", str(norm_pix)], "mae")
    assets = recipe.assets(None)
    able: Any = recipe.reconstructs(assets, recipe.build(assets), torch.device("cpu"))
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 16, 16), dtype=np.uint8))
    kept = torch.stack([able.mask(rng) for _ in images])
    shown = torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True).view(2, 1, 4, 4)
    shown = shown.repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(shown, images, 255 - images)
    drawn, again = (able.draw(able.predict(x, kept), x, kept) for x in (images, other))
    assert torch.equal(drawn, again) and not torch.equal(drawn, images)
    assert torch.equal(torch.where(shown, drawn, 0), torch.where(shown, images, 0))
    if not norm_pix:  # what is right comes out as it was
        assert torch.equal(able.draw(able.target(images), images, kept), images)


def test_images_of_questions_alone_are_trained_on_and_measured_once(tmp_path: Path):
    questions, annotations = write_vqa(tmp_path, 12)
    data = open_data(DataConfig(data=questions, annotations=annotations, val_fraction=0.5), seed=0)
    recipe = parse("mae", [], "mae")
    assert data.source is None and data.questions is not None and data.val_questions is not None
    loader = recipe.loader(data, recipe.assets(data), LoaderSpec(2, 0, 1, 0))
    images, kept = next(loader).parts[0]
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8 and kept.shape == (2, 4)
    held_out = data.held_out_images()
    identities = {data.val_questions.image_id(i) for i in range(len(data.val_questions))}
    assert held_out is not None and len(held_out) == len(identities)


# what MAE's class MaskedAutoencoderViT holds beside its blocks, and of a block
PUBLISHED = (
    "cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias mask_token "
    "decoder_embed.weight decoder_embed.bias decoder_pos_embed decoder_norm.weight decoder_norm.bias "
    "decoder_pred.weight decoder_pred.bias"
).split()
BLOCK = [f"{part}.{x}" for part in "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split() for x in ("weight", "bias")]


def test_published_files_start_a_run_and_are_a_tower(tmp_path: Path):
    torch.manual_seed(0)
    recipe = parse("mae", [], "mae")
    model = recipe.build(recipe.assets(None))
    state = PUBLISHED_LAYOUT.write(model.state_dict())
    names = [*PUBLISHED, *(f"blocks.{i}.{n}" for i in range(3) for n in BLOCK)]
    assert state.keys() == {*names, *(f"decoder_blocks.{i}.{n}" for i in range(2) for n in BLOCK)}
    encoder = {n: x for n, x in state.items() if "decoder" not in n and n != "mask_token"}
    torch.save({"model": state}, tmp_path / "whole.pth")
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    for file, starts in (("whole.pth", ""), ("encoder.pth", "visual.")):
        start = parse("mae", ["--init", str(tmp_path / file)], "mae")
        assets = start.assets(None)
        found = start.initial(assets, start.build(assets))
        assert found.keys() == {n for n in model.state_dict() if n.startswith(starts)}
        assert all(torch.equal(x, model.state_dict()[n]) for n, x in found.items())
        tower = load_tower(tmp_path / file)
        assert tower.config.image_size == 16 and tower.config.positions == "sincos"
        assert all(torch.equal(x, model.visual.state_dict()[n]) for n, x in tower.state.items())
    state["cls_token"] = torch.zeros(1, 1, 32)
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="a file of MAE's code must hold cls_token of shape"):
        parse("mae", ["--init", str(tmp_path / "other.pth")], "mae").assets(None)
