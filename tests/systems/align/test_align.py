"""ALIGN: parity with transformers' AlignModel, files both ways, BatchNorm under GradCache, the temperature."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AlignConfig, AlignModel

from mmcore.data import LoaderSpec
from mmcore.recipe import Step
from mmcore.systems.align.model import ALIGN
from mmcore.systems.align.recipe import ALIGN_CONFIGS, Align
from mmcore.systems.align.weights import TEXT, load_align, save_align
from tests.systems.clip.towers import BLOCK, moved
from tests.systems.flip.test_fewer_tokens import Bare

IMAGES = torch.randn(7, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
# of all lengths from one token to the whole context
TOKENS = torch.randint(1, 60, (7, 7), generator=torch.Generator().manual_seed(2)).tril()


def theirs() -> Any:
    vision, text = ALIGN_CONFIGS["tiny"][0].settings, {**BLOCK, "vocab_size": 60, "max_position_embeddings": 9}
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = moved(AlignModel(AlignConfig(vision_config=vision, text_config=text, projection_dim=64)))
    return model


@pytest.mark.parametrize("trains", [False, True])
def test_outputs_loss_and_every_gradient_equal_transformers(trains: bool, tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path / "x")
    ours = load_align(tmp_path / "x").double().train(trains)
    model = model.double().train(trains)
    # the eager one, which it has alone by its own account, has its softmax in float32
    model.text_model.config._attn_implementation = "sdpa"
    expected = model(input_ids=TOKENS, pixel_values=IMAGES, attention_mask=(TOKENS > 0).long(), return_loss=True)
    image, text, scale = ours(IMAGES, TOKENS)
    loss = Align().objective((image, text, scale), [], Step(0, 1, 0))["loss"]
    close: Any = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(image, expected.image_embeds, **close)
    torch.testing.assert_close(text, expected.text_embeds, **close)
    torch.testing.assert_close(loss, expected.loss, **close)
    loss.backward()
    expected.loss.backward()
    given = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    wanted = {n: x for n, x in ours.state_dict().items() if not n.startswith("visual.")}
    grads = TEXT.read("test", {n: x for n, x in given.items() if not n.startswith("vision_model.")}, wanted)
    grads |= {n.replace("vision_model.", "visual.body."): x for n, x in given.items() if n.startswith("vision_model.")}
    names = {n for n, p in ours.named_parameters() if p.grad is not None}
    assert names == set(grads) == {n for n, _ in ours.named_parameters()}
    for name, grad in grads.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, grad, **close, msg=name)


def test_what_is_written_is_an_align_model_of_transformers_with_the_same_embeddings(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "x")
    ours = load_align(tmp_path / "x").eval()
    save_align(ours, tmp_path / "y")
    again: Any = AlignModel.from_pretrained(tmp_path / "y").eval()
    expected = again(input_ids=TOKENS, pixel_values=IMAGES.float(), attention_mask=(TOKENS > 0).long())
    image, text, scale = ours(IMAGES.float(), TOKENS)
    torch.testing.assert_close(image, expected.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, expected.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale * image @ text.T, expected.logits_per_image, rtol=1e-4, atol=1e-5)
    odd = ALIGN(replace(ours.config, embed_dim=8, has_image_proj=True))
    with pytest.raises(ValueError, match="the image tower must be ALIGN's to be written as an AlignModel"):
        save_align(odd, tmp_path / "z")


def test_the_second_forward_of_gradcache_does_not_move_statistics_again() -> None:
    recipe = Align()
    data = recipe.open_data()
    assets = recipe.assets(data)
    parts = next(recipe.loader(data, assets, LoaderSpec(16, 0, 1, 0, accum=2))).parts
    model = recipe.build(assets).train()
    recipe.backward(Bare(model), parts, Step(0, 1, 0))
    counts = [x for n, x in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counts and all(x == len(parts) for x in counts)


def test_a_temperature_of_zero_is_refused_in_a_sentence() -> None:
    recipe = Align()
    model: Any = recipe.build(recipe.assets(recipe.open_data()))
    assert model(None, TOKENS)[2].item() == 1.0
    for value in (0.0, -0.5):
        model.temperature.data.fill_(value)
        with pytest.raises(ValueError, match="ALIGN: temperature must stay above 0, got"):
            model(None, TOKENS)
