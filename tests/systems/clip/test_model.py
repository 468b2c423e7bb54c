"""CLIP's towers: contracts, pooling, initialisation, checkpointing, position embeddings."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmcore.nn import interpolate_positions
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextConfig, VisionConfig, eos_positions
from mmcore.systems.clip.shapes import CLIP_CONFIGS, clip_config
from tests.mmcore.nn_fixtures import kept_bytes
from tests.refusals import refuses

EPS32 = torch.finfo(torch.float32).eps


def tiny_clip(seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(clip_config("tiny", vocab_size=50, context_length=9, eos_token_id=49))


def batch(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(num, 3, 16, 16, generator=generator)
    tokens = torch.randint(1, 48, (num, 9), generator=generator)
    tokens[:, 6], tokens[:, 7:] = 49, 0
    return images, tokens


def loss_of(model: CLIP, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    a, b, scale = model(images, tokens)
    return torch.nn.functional.cross_entropy(scale * a @ b.T, torch.arange(len(a)))


def test_embeddings_are_unit_norm_float32_and_scale_is_one_over_the_temperature():
    model, (images, tokens) = tiny_clip(), batch(3)
    a, b, scale = model(images, tokens)
    assert a.shape == b.shape == (3, 64) and a.dtype == b.dtype == torch.float32
    for features in (a, b):
        assert (features.norm(dim=-1) - 1).abs().max() < 4 * EPS32
    assert scale.shape == (1,) and scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    for alone, of in ((model(images, None), (a, None)), (model(None, tokens), (None, b))):
        assert all(x is None if y is None else torch.equal(x, y) for x, y in zip(alone, (*of, scale), strict=True))
    torch.testing.assert_close(model.encode_text(tokens[:, :7]), b, atol=1e-6, rtol=1e-5)  # of another padding


def test_an_empty_batch_runs_forward_and_backward_through_both_towers():
    model = tiny_clip()
    a, b, scale = model(torch.zeros(0, 3, 16, 16), torch.zeros(0, 9, dtype=torch.int64))
    assert a.shape == b.shape == (0, 64)
    (a.sum() + b.sum() + scale.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_activation_checkpointing_gives_bit_equal_gradients_and_keeps_less():
    found = []
    for enable in (False, True):
        model = tiny_clip()
        model.set_activation_checkpointing(enable)
        num_bytes, loss = kept_bytes(model, lambda model=model: loss_of(model, *batch(4)))
        loss.backward()
        found.append((num_bytes, [p.grad for p in model.parameters() if p.grad is not None]))
    (plain_bytes, plain), (less_bytes, recomputed) = found
    assert len(plain) == len(recomputed) and all(torch.equal(x, y) for x, y in zip(plain, recomputed))
    assert less_bytes < plain_bytes / 4


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "weights"])
def test_bfloat16_trains_on_images_of_float32_and_normalises_in_float32(weights: torch.dtype):
    model, (images, tokens) = tiny_clip(), batch(8)
    exact = model(images, tokens)
    model.to(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        a, b, scale = model(images, tokens)
    assert a.dtype == b.dtype == scale.dtype == torch.float32
    for features, gold in ((a, exact[0]), (b, exact[1])):
        assert (features.norm(dim=-1) - 1).abs().max() < 4 * EPS32
        # 8 bits of mantissa through a handful of layers
        assert (features * gold).sum(-1).min() > 0.999
    (a @ b.T * scale).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


WHOLE = [9, 9, 9]


def uneven() -> torch.Tensor:
    """Captions of 3, 9 and 1 tokens."""
    tokens = torch.randint(1, 48, (3, 9), generator=torch.Generator().manual_seed(7))
    for row, end in enumerate((2, 8, 0)):
        tokens[row, end], tokens[row, end + 1 :] = 49, 0
    return tokens


@pytest.mark.parametrize("lengths", [None, [3, 9, 1], [5, 9, 2]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_captions_without_what_follows_their_end_give_the_same_and_the_same_gradients(
    lengths: list[int] | None, checkpointing: bool
):
    found = []
    for of_captions in (lengths, WHOLE):
        model = tiny_clip().double()
        model.set_activation_checkpointing(checkpointing)
        features = model.text(uneven(), of_captions)
        (features * torch.arange(64)).sum().backward()
        found.append([features.detach(), *(p.grad for p in model.text.parameters())])
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12 * float(whole.abs().max()))


def test_compiled_the_text_tower_is_one_graph():
    model, tokens = tiny_clip(), uneven()
    compiled = torch.compile(model.encode_text, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), model.encode_text(tokens), atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for():
    model, tokens = tiny_clip().cuda(), uneven().cuda()
    model.encode_text(tokens, [3, 9, 1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.encode_text(tokens, [3, 9, 1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@given(st.lists(st.lists(st.integers(3, 30), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(3, 30))
def test_end_of_caption_is_the_first_end_token_or_the_first_highest_id(rows: list[list[int]], eos: int):
    tokens = torch.tensor(rows)
    firsts = [row.index(eos) if eos in row else 0 for row in rows]
    highest = [row.index(max(row)) for row in rows]
    assert eos_positions(tokens, eos).tolist() == firsts and eos_positions(tokens, None).tolist() == highest
    assert eos_positions(tokens, 2).tolist() == highest


def test_initial_weights_have_the_published_standard_deviations():
    torch.manual_seed(0)
    model, width = CLIP(clip_config("small")), 256
    stds: list[tuple[Any, float]] = [
        (model.text.token_embedding.weight, 0.02), (model.text.position_embedding, 0.01),
        (model.visual.position_embedding, width**-0.5),
    ]  # fmt: skip
    for tower, num_layers in ((model.visual, 6), (model.text, 4)):
        stds.append((tower.proj.weight, width**-0.5))
        for block in tower.transformer.blocks:
            attn, mlp, out = block.attn, block.mlp, width**-0.5 * (2 * num_layers) ** -0.5
            stds += [(attn.qkv.weight, width**-0.5), (attn.out.weight, out)]  # pyright: ignore
            stds += [(mlp.fc1.weight, (2 * width) ** -0.5), (mlp.fc2.weight, out)]  # pyright: ignore
            assert not attn.qkv.bias.any() and not mlp.fc1.bias.any()  # pyright: ignore
    for weight, std in stds:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.visual.class_embedding.std().item() == pytest.approx(width**-0.5, rel=0.2)  # pyright: ignore
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_interpolated_positions_keep_the_prefix_constants_and_orientation():
    positions = torch.randn(2 + 16, 3)
    positions[2:, 0] = 7
    rows = torch.arange(4.0).repeat_interleave(4)
    positions[2:, 1], positions[2:, 2] = rows, rows.reshape(4, 4).T.reshape(-1)
    out = interpolate_positions(positions, 64, num_prefix=2)
    assert torch.equal(out[:2], positions[:2])
    torch.testing.assert_close(out[2:, 0], torch.full((64,), 7.0))
    grid = out[2:].reshape(8, 8, 3)
    # rows grow downwards and are constant along x; columns the other way round
    assert (grid[1:, :, 1] > grid[:-1, :, 1]).all() and grid[:, :, 1].std(dim=1).max() < 1e-5
    torch.testing.assert_close(grid[:, :, 2], grid[:, :, 1].T)


def test_interpolation_there_and_back_returns_smooth_positions():
    ramp = torch.linspace(-1, 1, 8)
    smooth = torch.stack([ramp.repeat_interleave(8), (ramp * 2).cos().repeat(8)], dim=1)
    positions = torch.cat([torch.zeros(1, 2), smooth])
    back = interpolate_positions(interpolate_positions(positions, 256), 64)
    inner = (back - positions)[1:].reshape(8, 8, 2)[1:-1, 1:-1]
    assert inner.abs().max() < 0.03 and interpolate_positions(positions.bfloat16(), 16).dtype == torch.bfloat16


def test_configurations_have_the_published_sizes():
    published = {"ViT-B-32": 151_277_313, "ViT-B-16": 149_620_737, "ViT-L-14": 427_616_513, "ViT-L-14-336": 427_944_193}
    for name, count in published.items():
        for full, activation in ((name, "gelu"), (f"{name}-quickgelu", "quick_gelu")):
            config = CLIP_CONFIGS[full]
            with torch.device("meta"):
                assert sum(p.numel() for p in CLIP(config).parameters()) == count, full
            assert config.vision.activation == config.text.activation == activation


def test_a_configuration_is_fitted_to_the_tokenizer():
    config = clip_config("ViT-B-32", vocab_size=300, context_length=20, eos_token_id=299)
    assert (config.text.vocab_size, config.text.context_length, config.text.eos_token_id) == (300, 20, 299)
    assert clip_config("ViT-B-32") == CLIP_CONFIGS["ViT-B-32"]
    assert clip_config("ViT-B-32", vocab_size=300).text.eos_token_id is None
    assert clip_config("ViT-B-32", vocab_size=50_000).text.eos_token_id == 49407


def test_bad_inputs_and_impossible_shapes_are_refused_in_one_line():
    model, text = tiny_clip(), uneven()
    for shape in ((1, 3, 17, 16), (1, 3, 32, 32), (1, 1, 16, 16), (3, 16, 16)):
        message = rf"images must be \[B, 3, 16, 16\], got {re.escape(str(list(shape)))}$"
        refuses(message, model.encode_image, torch.zeros(shape))
    refuses(
        r"uint8 or floating point, got torch\.int64", model.encode_image, torch.zeros(1, 3, 16, 16, dtype=torch.int64)
    )
    for shape in ((1, 10), (9,), (1, 0)):
        message = rf"\[B, T\] with 1 <= T <= 9, got {re.escape(str(list(shape)))}"
        refuses(message, model.encode_text, torch.zeros(shape, dtype=torch.int64))
    refuses("tokens must be int64, got torch.float32", model.encode_text, torch.zeros(1, 9))
    for lengths in ([3, 9], [3, 10, 1], [3, 9, 0]):
        message = f"lengths must be 3 from 1 to 9, one a caption, got {re.escape(str(lengths))}"
        refuses(message, model.encode_text, text, lengths)
    message = "must reach each caption's end token, got 2 for caption 0, which ends at token 2"
    refuses(message, model.encode_text, text, [2, 9, 1])
    refuses("positions must hold a square grid of patches, got 15", interpolate_positions, torch.zeros(16, 4), 16)
    refuses("num_patches must be a square number, got 15", interpolate_positions, torch.zeros(17, 4), 15)
    refuses(r"tiny, small, ViT-B-32, .*got 'ViT-B32'; did you mean 'ViT-B-32'\?", clip_config, "ViT-B32")
    refuses(r"got 'zzz'$", clip_config, "zzz")
    refuses("image_size must be a multiple of patch_size 32, got 225", VisionConfig, image_size=225)
    refuses("num_heads must divide width 768, got 5", VisionConfig, num_heads=5)
    refuses("num_layers must be at least 1, got 0", VisionConfig, num_layers=0)
    refuses("activation must be one of .*got 'relu'", TextConfig, activation="relu")
    refuses(r"eos_token_id must be in \[0, 10\), got 10", TextConfig, vocab_size=10, eos_token_id=10)
    refuses("embed_dim must be at least 1, got 0", CLIPConfig, embed_dim=0)
