"""VLMo against a dense transcript by its published names, its stages, files, sizes of images and traps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline

from mmcore.fusion_recipe import AnswerBatch, FusionBatch
from mmcore.losses import hard_negatives
from mmcore.nn.relative import resized_distances
from mmcore.parts.vit import Tower, ViT
from mmcore.recipe import Step
from mmcore.systems.vlmo.model import VLMo, VlmoConfig
from mmcore.systems.vlmo.recipe import TextBatch, Vlmo, VlmoText, vision_of
from mmcore.systems.vlmo.shapes import vlmo_vision
from mmcore.systems.vlmo.vqa import VlmoVqa
from mmcore.systems.vlmo.weights import LAYOUT, fitted_state, load_vlmo, of_tower, save_vlmo
from tests.refusals import refuses
from tests.systems.vlmo.transcript import Published, linear

HEADS, LAYERS, VOCAB, LENGTH, MOST = 2, 3, 29, 8, 12
_SIZES = 12, 4, 16, LAYERS, HEADS, 24
_WORDS: Any = {"vocab_size": VOCAB, "num_text": LENGTH, "num_distances": MOST, "num_joint": 1}
CONFIGS = {
    "base": VlmoConfig(vlmo_vision(*_SIZES, drop_path=0.0), **_WORDS),
    "base-plus": VlmoConfig(
        vlmo_vision(*_SIZES, drop_path=0.0, positions="learned", relative_positions="none", layer_scale=None), **_WORDS
    ),
}


def a_model(config: VlmoConfig, seed: int = 0) -> VLMo:
    """Moved by noise, so that no zero or unit hides anything."""
    torch.manual_seed(seed)
    model = VLMo(config).double()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def a_batch(size: int = 5) -> FusionBatch:
    torch.manual_seed(3)
    num_text = torch.tensor([7, 5, 2, 1, 6])[:size]
    tokens = torch.randint(5, VOCAB, (size, LENGTH)).masked_fill(torch.arange(LENGTH) >= num_text[:, None], 0)
    is_hidden = (torch.rand(size, LENGTH) < 0.3) & (torch.arange(LENGTH) < num_text[:, None])
    is_hidden[0, 1] = True
    images = torch.randn(size, 3, 12, 12, dtype=torch.float64)
    masked, labels = tokens.masked_fill(is_hidden, 4), tokens.masked_fill(~is_hidden, -100)
    return FusionBatch(images, tokens, num_text, masked, labels, torch.arange(size), torch.arange(size))


def published(model: VLMo) -> tuple[Published, dict[str, Any]]:
    """The transcript on a model's weights, and these by its names, which want gradients."""
    state = {name: x.requires_grad_() for name, x in LAYOUT.write(model.state_dict()).items()}
    return Published(state, HEADS, LAYERS, LAYERS - 1, 3, LENGTH, MOST), state


def assert_gradients_equal(model: VLMo, state: dict[str, Any]) -> None:
    grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in state.items()}
    wanted = LAYOUT.read("test", grads, model.state_dict())
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_every_gradient_are_the_published_ones(name: str, recompute: bool) -> None:
    """Texts are cut to the longest of the batch, 7, here and padded to all 8 there: what is padded changes nothing."""
    model, batch = a_model(CONFIGS[name]), a_batch()
    model.activation_checkpointing = recompute
    found = model("pairs", *batch[:3])
    negatives = hard_negatives(
        found.image[:, None], found.text, found.scale, image_ids=batch.image_ids, text_ids=batch.text_ids,
        generator=Step(0, 9, 5).generator,
    )  # fmt: skip
    losses = Vlmo().loss(model, batch, Step(0, 9, 5))
    theirs, state = published(model)
    seen = torch.arange(LENGTH) < batch.num_text[:, None]
    wrong = negatives.images, negatives.texts
    expected = theirs.losses(batch.images, batch.tokens, seen, batch.masked, batch.labels, wrong)
    for name, x in zip(("contrast", "matching", "words"), expected, strict=True):
        torch.testing.assert_close(losses[name], x, rtol=0, atol=1e-9)
    losses["loss"].backward()
    torch.stack(expected).sum().backward()
    assert_gradients_equal(model, state)


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_alone_teach_what_is_published_and_leave_the_image_tower_as_it_was(name: str) -> None:
    model, batch, recipe = a_model(CONFIGS[name]), a_batch(), VlmoText()
    theirs, state = published(model)
    seen = torch.arange(LENGTH) < batch.num_text[:, None]
    loss = VlmoText(freeze=False).loss(model, TextBatch(batch.masked, batch.num_text, batch.labels), Step(0, 1, 0))[
        "loss"
    ]
    expected = theirs.text_mlm(batch.masked, seen, batch.labels)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    loss.backward()
    expected.backward()
    assert_gradients_equal(model, state)
    before = model.image_states(batch.images)
    learned = [p for n, p in model.named_parameters() if recipe.learns(n)]
    assert 0 < len(learned) < len(list(model.parameters()))
    torch.optim.AdamW(learned, lr=0.1, weight_decay=0.0).step()
    assert torch.equal(model.image_states(batch.images), before)
    assert not torch.equal(model.text_states(batch.tokens, batch.num_text)[:, 0], before[:, 0])


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_the_published_ones(name: str) -> None:
    model, batch = a_model(replace(CONFIGS[name], num_answers=6)), a_batch()
    targets = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0])[torch.randint(5, (5, 6))]
    targets[1] = 0  # no known answer
    loss = VlmoVqa().loss(model, AnswerBatch(batch.images, batch.tokens, batch.num_text, targets), Step(0, 1, 0))[
        "loss"
    ]
    theirs, state = published(model)
    x = theirs.infer(batch.images, batch.tokens, torch.arange(LENGTH) < batch.num_text[:, None])[1]
    x = linear(x, state, "vqa_classifier.0")
    x = F.gelu(F.layer_norm(x, x.shape[-1:], state["vqa_classifier.1.weight"], state["vqa_classifier.1.bias"]))
    logits = linear(x, state, "vqa_classifier.3")
    expected = F.binary_cross_entropy_with_logits(logits, targets.double()) * 6
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    loss.backward()
    expected.backward()
    assert_gradients_equal(model, state)


def test_the_experts_of_images_are_a_vit_and_begin_as_one() -> None:
    """BEiT has one table for all layers; it is each layer's to begin with."""
    batch = a_batch()
    for config in CONFIGS.values():
        model = a_model(config)
        tower = model.image_tower()
        vit = ViT(tower.config).double()
        vit.load_state_dict(tower.state)
        torch.testing.assert_close(vit(batch.images), model.image_states(batch.images), rtol=0, atol=1e-12)
    beit = replace(CONFIGS["base"].vision, relative_positions="shared", has_mask_token=True)
    torch.manual_seed(1)
    vit = ViT(beit).double()
    assert vit.relative is not None
    vit.relative.table.data.normal_()
    given = Tower(beit, vit.state_dict()).bare
    config = replace(CONFIGS["base"], vision=vision_of("vlmo", Path("x"), given.config, CONFIGS["base"]))
    model = a_model(config, 2)
    state = of_tower(given, config)
    assert {name for name in state} <= set(model.state_dict())
    model.load_state_dict({**model.state_dict(), **state})
    torch.testing.assert_close(model.image_states(batch.images), vit(batch.images), rtol=0, atol=1e-12)
    refuses(
        "--vision must be a tower as BEiT has it",
        vision_of,
        "vlmo",
        Path("x"),
        replace(beit, has_norm_pre=True),
        config,
    )


def test_distances_are_resized_by_the_published_splines() -> None:
    """Theirs is scipy's interp2d, which is gone: a spline through all points, as RectBivariateSpline's."""
    for old, new in ((3, 5), (14, 24), (4, 3)):
        width, wide = 2 * old - 1, 2 * new - 1
        table = torch.randn(width**2 + 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        low, high, q = 1.01, 1.5, 1.01
        while high - low > 1e-6:
            q = (low + high) / 2
            low, high = (low, q) if (1 - q ** (width // 2)) / (1 - q) > wide // 2 else (q, high)
        far = np.cumsum([q**i for i in range(width // 2)])
        at = np.concatenate([-far[::-1], [0], far])
        wanted = np.clip(np.arange(-(wide // 2), wide // 2 + 1.0), at[0], at[-1])
        found = resized_distances(table, old, new)
        for column in range(2):
            spline = RectBivariateSpline(at, at, table[: width**2, column].view(width, width).numpy(), s=0)
            theirs = torch.from_numpy(spline(wanted, wanted)).flatten()
            torch.testing.assert_close(found[: wide**2, column], theirs, rtol=0, atol=1e-12)
        assert torch.equal(found[wide**2 :], table[width**2 :])
    assert resized_distances(table, old, old) is table
    # a grid of one, or two, patches a side
    assert torch.equal(resized_distances(torch.ones(6, 2), 1, 3), torch.ones(30, 2))
    torch.testing.assert_close(resized_distances(torch.ones(14, 2), 2, 4), torch.ones(54, 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_files_have_the_published_names_both_ways(name: str, tmp_path: Path) -> None:
    model = VLMo(CONFIGS[name])
    save_vlmo(model, tmp_path / "out")
    again = load_vlmo(tmp_path / "out")
    assert again.config == CONFIGS[name]
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in model.state_dict().items())
    # as published: a torch file of {"state_dict": ...} without a shape, whose heads have 64 channels
    wide = replace(CONFIGS[name].vision, width=64, num_heads=1)
    config = replace(CONFIGS[name], vision=wide, num_distances=196)
    state = LAYOUT.write(VLMo(config).state_dict())
    assert state["logit_scale"].ndim == 0 and state["transformer.cls_token"].shape == (1, 1, 64)
    more = {"text_embeddings.position_ids": torch.arange(LENGTH)[None], "relative_position_index": torch.zeros(1)}
    if name == "base":  # where they are, without a use
        more["text_embeddings.position_embeddings.weight"] = torch.zeros(LENGTH, 64)
    file = tmp_path / "vlmo.pt"
    torch.save({"state_dict": {f"module.{n}": x for n, x in {**state, **more}.items()}}, file)
    found = load_vlmo(file)
    assert replace(found.config, vision=replace(found.config.vision, drop_path=0.0)) == config
    assert all(torch.equal(x, state[n]) for n, x in LAYOUT.write(found.state_dict()).items())
    # of the text stage: no expert of both, no heads of pairs
    text = {n: x for n, x in state.items() if "_vl" not in n and not n.startswith(("itm", "itc", "logit", "pooler"))}
    torch.save(text, file)
    assert torch.equal(load_vlmo(file).state_dict()["norm.weight"], state["transformer.norm.weight"])
    torch.save({n: x for n, x in state.items() if n != "transformer.norm.bias"}, file)
    refuses("missing transformer.norm.bias", load_vlmo, file)


@pytest.mark.parametrize("name", CONFIGS)
def test_larger_images_and_shorter_texts_go_on_from_the_same_weights(name: str) -> None:
    model, batch = a_model(CONFIGS[name]), a_batch()
    larger = replace(CONFIGS[name], vision=replace(CONFIGS[name].vision, image_size=20), num_text=6)
    other = VLMo(larger).double()
    other.load_state_dict(fitted_state(model.state_dict(), 3, larger))
    words = batch.tokens[:, :6], batch.num_text.clamp(max=6)
    torch.testing.assert_close(other.text_states(*words), model.text_states(*words), rtol=0, atol=1e-12)
    other.match(torch.zeros(1, 3, 20, 20, dtype=torch.float64), torch.zeros(5, dtype=torch.int64), *words)


def test_a_batch_of_one_and_one_without_hidden_words_have_finite_losses() -> None:
    model, batch = a_model(CONFIGS["base"]), FusionBatch(*(x[:1] for x in a_batch()))
    batch = batch._replace(masked=batch.tokens, labels=torch.full_like(batch.labels, -100))
    losses = Vlmo().loss(model, batch, Step(0, 9, 5))
    losses["loss"].backward()
    assert losses["words"] == 0 and all(x.isfinite() for x in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_makes_no_sense_is_refused() -> None:
    refuses("--freeze must come with --vision or --from", VlmoText().assets, None)
    refuses("--vision must be left out with --from", Vlmo(start=Path("a"), vision=Path("b")).assets, None)
    refuses("num_joint must be from 1 to below 3 layers, got 3", replace, CONFIGS["base"], num_joint=3)
    refuses("num_text must be at most num_distances 12, got 13", replace, CONFIGS["base"], num_text=13)
    refuses("--head-lr-scale must be above 0", VlmoVqa(head_lr_scale=0.0).assets, None)
