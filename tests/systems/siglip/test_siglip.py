"""SigLIP: parity with transformers' SiglipModel and Siglip2Model, files both ways, and what goes wrong elsewhere."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    ViTImageProcessorPil,
)

from mmcore.losses import global_sigmoid_loss
from mmcore.parts.language import tiny_language_model, tiny_tokenizer
from mmcore.parts.padded import PaddedTokenizer, load_padded_tokenizer
from mmcore.parts.vit import ViT
from mmcore.runs import read_run
from mmcore.systems.llava.model import Llava, LlavaConfig
from mmcore.systems.siglip.model import SigLIP
from mmcore.systems.siglip.recipe import Siglip
from mmcore.systems.siglip.shapes import NAMES, siglip_config
from mmcore.systems.siglip.weights import LAYOUT, SETTINGS, load_siglip, save_siglip
from mmcore.tasks.subject import Subject
from mmcore.train import trainer
from mmcore.train.config import RunConfig
from mmcore.train.optim import param_groups

BLOCK = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
TEXT = {**BLOCK, "vocab_size": 50, "max_position_embeddings": 7, "bos_token_id": 1, "eos_token_id": 1}
KINDS: dict[str, Any] = {
    "siglip": (SiglipConfig, SiglipModel, {"image_size": 16}),
    "siglip, a margin": (SiglipConfig, SiglipModel, {"image_size": 18}),
    "siglip2": (Siglip2Config, Siglip2Model, {"num_patches": 16}),
}


def theirs_of(kind: str) -> Any:
    """No weight is where it began."""
    config, model, sizes = KINDS[kind]
    torch.manual_seed(0)
    theirs = model(config(vision_config={**BLOCK, "patch_size": 4, **sizes}, text_config=TEXT))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    theirs.set_attn_implementation("sdpa")  # the eager one has its softmax in float32
    return theirs.eval()


def batch(pixels: int) -> tuple[Tensor, Tensor]:
    """Captions of all lengths from one token to the whole context."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 50, (7, 7), generator=generator).tril()
    return torch.randn(7, 3, pixels, pixels, dtype=torch.float64, generator=generator), tokens


def pixels_for(kind: str, images: Tensor) -> dict[str, Tensor]:
    if kind != "siglip2":
        return {"pixel_values": images}
    rows = images.unflatten(3, (4, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 3, 5, 1).reshape(len(images), 16, 48)
    mask = torch.ones(len(images), 16, dtype=torch.int64)
    return {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": torch.full((len(images), 2), 4)}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_loss_and_every_gradient_equal_transformers(kind: str, tmp_path: Path) -> None:
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_siglip(tmp_path / "theirs").double()
    images, tokens = batch(ours.config.vision.image_size)
    expected = theirs.double()(input_ids=tokens, return_loss=True, **pixels_for(kind, images))
    image, text, scale, bias = ours(images, tokens)
    loss = global_sigmoid_loss(image, text, scale, bias)
    table = (image, expected.image_embeds), (text, expected.text_embeds), (loss, expected.loss)
    for found, wanted in (*table, (scale * text @ image.T + bias, expected.logits_per_text)):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    loss.backward()
    expected.loss.backward()
    gradients = LAYOUT.read("test", {n: p.grad for n, p in theirs.named_parameters()}, ours.state_dict())
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        # Siglip2Model resizes positions in float32, to the size that they have too
        close = 1e-6 if (kind, name) == ("siglip2", "visual.position_embedding") else 1e-9
        torch.testing.assert_close(p.grad, gradients[name], rtol=close, atol=close, msg=name)

    tower = ours.image_tower()
    vit = ViT(tower.config).double()
    vit.load_state_dict(tower.state)
    states = expected.vision_model_output.last_hidden_state
    torch.testing.assert_close(vit(images), states, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_a_siglip_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs_of(kind).save_pretrained(tmp_path / "theirs")
    ours = load_siglip(tmp_path / "theirs").eval()
    save_siglip(ours, tmp_path / "ours")
    theirs = SiglipModel.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert LAYOUT.write(ours.state_dict()).keys() == theirs.state_dict().keys()
    images, tokens = batch(ours.config.vision.image_size)
    with torch.no_grad():
        expected: Any = theirs(input_ids=tokens, pixel_values=images.float())
        for found, wanted in zip(ours(images, tokens), (expected.image_embeds, expected.text_embeds)):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert load_siglip(tmp_path / "ours").config == ours.config


def test_shapes_are_those_that_were_published() -> None:
    bare = {"model_type": "siglip", "vision_config": {}, "text_config": {}}
    assert SETTINGS.read("test", bare) == siglip_config("B-16-224")
    large = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
    config = SETTINGS.read("test", bare | {"vision_config": {**large, "image_size": 384, "patch_size": 14}})
    assert config.vision == siglip_config("So400m-14-384").vision and config.vision.num_patches == 27**2
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in SigLIP(siglip_config(name)).parameters()) for name in NAMES}
    published = {"B-16-224": 203_155_970, "L-16-256": 652_150_786, "So400m-14-384": 877_960_498}
    assert {name: sizes[name] for name in published} == published
    with pytest.raises(ValueError, match=r"name must be one of tiny, B-16-224, .*, got .B-16."):
        siglip_config("B-16")


def test_the_first_loss_is_that_of_few_positives_and_its_scalars_neither_decay_nor_are_clamped() -> None:
    model = SigLIP(siglip_config("tiny"))
    image, text = (torch.nn.functional.normalize(torch.randn(64, 128), dim=1) for _ in range(2))
    first = global_sigmoid_loss(image, text, model.logit_scale.exp(), model.logit_bias)
    assert first.item() == pytest.approx(10, abs=0.3)
    assert float(global_sigmoid_loss(image, text, 1.0, 0.0)) == pytest.approx(64 * math.log(2), rel=0.01)
    recipe = Siglip()
    assert (recipe.optim.lr, recipe.optim.beta2, recipe.optim.weight_decay) == (1e-3, 0.95, 0.1)
    groups = param_groups(model, recipe.optim, recipe.rules)
    for scalar in (model.logit_scale, model.logit_bias):
        [group] = [group for group in groups if any(p is scalar for p in group["params"])]
        assert scalar.shape == (1,) and group["weight_decay"] == 0 and group["clamp"] is None


def test_in_bfloat16_the_bias_is_added_in_float32() -> None:
    torch.manual_seed(0)
    model = SigLIP(siglip_config("tiny")).bfloat16()
    image, text, scale, bias = model(torch.randn(8, 3, 16, 16), torch.randint(1024, (8, 16)))
    assert {x.dtype for x in (image, text, scale, bias)} == {torch.float32}
    z = 2 * torch.eye(8, dtype=torch.float64) - 1
    logits = scale.double() * image.double() @ text.double().T + bias.double()
    expected = -torch.nn.functional.logsigmoid(z * logits).sum() / 8
    torch.testing.assert_close(global_sigmoid_loss(image, text, scale, bias).double(), expected, rtol=1e-6, atol=0)


def test_captions_are_lower_case_and_padded_to_the_context_however_long_the_others_are(tmp_path: Path) -> None:
    words = {w: i for i, w in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "▁a", "▁cat", "a", "▁", "c", "t"))}
    gemma = Siglip2Tokenizer(words, merges=[], padding_side="right")
    gemma.save_pretrained(tmp_path / "gemma")
    ours = load_padded_tokenizer(tmp_path / "gemma", 6)
    texts = ["A cat", "a", "a a a a a a a a"]
    expected = gemma([x.lower() for x in texts], padding="max_length", truncation=True, max_length=6).input_ids
    assert ours(texts).tolist() == expected and ours(texts[1:2]).tolist() == expected[1:2]
    ours.save(tmp_path / "again")
    assert load_padded_tokenizer(tmp_path / "again", 6)(texts).tolist() == expected
    with pytest.raises(ValueError, match=r"tokens must be \[B, 16\], padded, got \[2, 9\]"):
        SigLIP(siglip_config("tiny"))(None, torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"folder must hold tokenizer.json, got"):
        load_padded_tokenizer(tmp_path, 6)
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="tokenizer must have padding or an end of text, got neither"):
        PaddedTokenizer(bare, 6)


def test_a_run_follows_what_it_is_exports_it_whole_and_gives_others_a_start_and_a_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(trainer, "follow", lambda subject: seen.append(subject.held_out.image) or {})
    run = RunConfig(out=tmp_path / "run", steps=8, batch_size=32, eval_every=4)
    trainer.train("siglip", Siglip(run=run), is_quiet=True)
    trained: Any = read_run(tmp_path / "run")
    recipe, data, model = trained.recipe, trained.recipe.open_data(), trained.model
    now = Subject(recipe, trained.assets, model, data, torch.device("cpu")).held_out.image
    torch.testing.assert_close(seen[-1], now)
    assert (seen[0] - now).abs().max() > 1e-3

    recipe.export(trained.assets, model, tmp_path / "hf", "hf")
    theirs = SiglipModel.from_pretrained(tmp_path / "hf").eval()
    captions = ["a scan of the digit Three", "nine"]
    ids = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")(captions, padding="max_length", return_tensors="pt")
    pictures = [data.val.raw_image(i) for i in range(3)]
    pixels = trained.assets.preprocess(pictures)
    prepared = ViTImageProcessorPil.from_pretrained(tmp_path / "hf")(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        image, text, scale, bias = model(pixels, trained.assets.tokenizer(captions))
        expected: Any = theirs(input_ids=ids.input_ids, pixel_values=prepared)
    torch.testing.assert_close(expected.logits_per_image, scale * image @ text.T + bias, atol=0.05, rtol=0)

    start = Siglip(init=tmp_path / "hf").assets(data)
    assert start.shape == model.config and torch.equal(start.tokenizer(captions), trained.assets.tokenizer(captions))
    with pytest.raises(ValueError, match="--model must be left out with --init, got B-16-224"):
        Siglip(init=tmp_path / "hf", model="B-16-224").assets(data)
    tokenizer = tiny_tokenizer(["a"])
    llava = Llava(LlavaConfig(recipe.image_tower(trained.assets, model).config), tiny_language_model(tokenizer))
    assert llava.features(pixels).shape == (3 * 16, 128)
