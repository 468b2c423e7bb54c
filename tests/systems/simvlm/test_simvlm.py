"""SimVLM: both forms beside dense masks in float64, texts that go on, prefixes, texts without images, files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.data import LoaderSpec
from mmcore.parts.text import TextConfig
from mmcore.parts.vit import VisionConfig
from mmcore.recipe import Step
from mmcore.systems.simvlm.model import SimVLM, SimVLMConfig
from mmcore.systems.simvlm.recipe import Simvlm, SimvlmVqa, prefixed
from mmcore.systems.simvlm.weights import load_simvlm, save_simvlm
from tests.systems.clip.towers import moved

VISION = VisionConfig(image_size=8, patch_size=4, width=16, num_layers=2, num_heads=2, mlp_dim=24)
TEXT = TextConfig(vocab_size=30, context_length=12, width=16, num_layers=2, num_heads=2, mlp_dim=24)
END = 3
IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(4, 30, (4, 9), generator=torch.Generator().manual_seed(2))
NUM_TEXT = torch.tensor([9, 5, 2, 7])
NUM_PREFIX = torch.tensor([3, 4, 1, 1])  # of the second the end is left, of the others the start is all there is
TEXTS = prefixed(TOKENS, NUM_TEXT, NUM_PREFIX)
ENDS: dict[str, Any] = {"eos_token_id": END, "pad_token_id": 0, "max_length": 4}


def model_of(has_decoder: bool) -> SimVLM:
    torch.manual_seed(0)
    return moved(SimVLM(SimVLMConfig(VISION, TEXT, has_decoder))).double()


def attended(attn: Any, x: Tensor, states: Tensor, seen: Tensor) -> Tensor:
    """What each of x [B, T, D] reads of states, of which it sees `seen`, bool [B, T, L]."""
    if hasattr(attn, "qkv"):
        q, k, v = attn.qkv(x).chunk(3, -1)
    else:
        q, (k, v) = attn.q(x), attn.kv(states).chunk(2, -1)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (q, k, v))
    logits = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~seen[:, None], -torch.inf)
    return attn.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def layers(blocks: Any, x: Tensor, seen: Tensor) -> Tensor:
    for block in blocks:
        y = block.norm1(x)
        x = x + attended(block.attn, y, y, seen)
        x = x + block.mlp(block.norm2(x))
    return x


def embedded(model: SimVLM, images: Tensor | None, row: int, tokens: Tensor) -> Tensor:
    words = model.token_embedding(tokens) + model.position_embedding[: len(tokens)]
    if images is None:
        return words[None]
    return torch.cat([model.stem(images[row : row + 1])[0] + model.image_position, words])[None]


def reference(model: SimVLM, images: Tensor | None) -> Tensor:
    """The sum of the losses, a row at a time, with dense masks."""
    total = torch.zeros((), dtype=torch.float64)
    num_image = 0 if images is None else 4
    for row, (num_text, num_prefix) in enumerate(zip(NUM_TEXT.tolist(), NUM_PREFIX.tolist(), strict=True)):
        tokens = TOKENS[row, :num_text]
        if not model.config.has_decoder:
            x = embedded(model, images, row, tokens)
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            seen[:, : num_image + num_prefix] = True
            states = layers(model.transformer.blocks, x, seen[None])[0, num_image + num_prefix - 1 : -1]
        else:
            x = embedded(model, images, row, tokens[:num_prefix])
            assert model.norm_prefix is not None
            prefix = layers(model.transformer.blocks, x, torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool))
            prefix, places = model.norm_prefix(prefix), torch.arange(num_prefix - 1, num_text - 1)
            y = (model.token_embedding(tokens[places]) + model.position_embedding[places])[None]
            causal = torch.ones(1, len(places), len(places), dtype=torch.bool).tril()
            for block in model.decoder:
                z: Any = block
                y = y + attended(z.attn, (n := z.norm1(y)), n, causal)
                everything = torch.ones(1, len(places), prefix.shape[1], dtype=torch.bool)
                y = y + attended(z.cross, z.norm_cross(y), prefix, everything)
                y = y + z.mlp(z.norm2(y))
            states = y[0]
        logits = model.head.norm(states) @ model.token_embedding.weight.T
        total = total + F.cross_entropy(logits, tokens[num_prefix:], reduction="sum")
    return total


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("has_decoder", [True, False])
def test_loss_and_every_gradient_equal_those_of_dense_masks(has_decoder: bool, has_image: bool) -> None:
    model, images = model_of(has_decoder), IMAGES if has_image else None
    total, count = model("loss", images, *TEXTS)
    expected = reference(model, images)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)
    assert count == (NUM_TEXT - NUM_PREFIX).sum()
    names, weights = zip(*((n, p) for n, p in model.named_parameters()), strict=True)
    found, wanted = (torch.autograd.grad(x, weights, allow_unused=True) for x in (total, expected))
    for name, x, y in zip(names, found, wanted, strict=True):
        if not has_image and name.startswith(("stem", "image_position")):
            assert x is None
        elif y is not None:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=name)
        else:
            assert x is None or not x.any(), name


@pytest.mark.parametrize("has_decoder", [True, False])
def test_texts_go_on_by_the_likeliest_words_of_the_whole_model(has_decoder: bool) -> None:
    model, rows = model_of(has_decoder), torch.arange(4)
    prompts, texts, lengths = TOKENS[:, :4], TOKENS.clone(), NUM_PREFIX.clone()
    expected = []
    for _ in range(4):  # behind one more token each time, whose prefix stays
        logits, _ = model("logits", IMAGES, *prefixed(texts, lengths + 1, NUM_PREFIX))
        place = lengths - (NUM_PREFIX if has_decoder else 1)
        likeliest = logits[rows, place].argmax(1)
        texts[rows, lengths] = likeliest
        expected.append(likeliest)
        lengths = lengths + 1
    wanted = torch.stack(expected, 1)
    wanted = wanted.masked_fill((wanted == END).cumsum(1).cumsum(1) > 1, 0)
    found = model("generate", IMAGES, prompts, NUM_PREFIX, **ENDS)
    assert torch.equal(found, wanted[:, : found.shape[1]])
    beams = model("generate", IMAGES, prompts, NUM_PREFIX, num_beams=3, **ENDS)
    for i, row in enumerate(beams):
        part = slice(i, i + 1)
        one = model("generate", IMAGES[part], prompts[part], NUM_PREFIX[part], num_beams=3, **ENDS)[0]
        assert torch.equal(row[: len(one)], one)
    with pytest.raises(ValueError, match=r"SimVLM.generate: max_length must be in \[1, 8\], got 9"):
        model("generate", IMAGES, prompts, NUM_PREFIX, **ENDS | {"max_length": 9})


def test_a_prefix_leaves_a_token_and_is_as_likely_to_end_anywhere() -> None:
    recipe = Simvlm()
    assets = recipe.assets(recipe.open_data())
    found = recipe.drawn(assets, ["the digit seven"] * 3000 + [""], range(3001))
    counts = np.bincount(found.num_prefix[:-1].numpy())
    assert counts[0] == 0 and len(counts) == found.num_text[0] and found.num_prefix[-1] == 1
    share = 3000 / (len(counts) - 1)
    assert (abs(counts[1:] - share) < 4 * share**0.5).all()


@pytest.mark.parametrize("one_stack", [True, False])
def test_texts_without_images_come_with_every_batch_and_count_by_their_words(one_stack: bool, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a seven by hand\n\n  two words here \n")
    recipe = Simvlm(text_data=file, text_share=0.5, one_stack=one_stack)
    data = recipe.open_data()
    assets = recipe.assets(data)
    batch, half, least = (next(recipe.loader(data, assets, LoaderSpec(n, 0, 8 // n, 0))).parts[0] for n in (8, 4, 1))
    assert 2 <= len(batch.alone.tokens) <= 7 and least.alone.num_learned == 0
    assert len(half.alone.tokens) <= len(batch.alone.tokens)
    model = recipe.build(assets)
    assert recipe.loss(model, least, Step(0, 1, 0))["texts"] == 0
    losses, (total, count) = recipe.loss(model, batch, Step(0, 1, 0)), model("loss", batch.images, *batch.texts)
    of_texts, num_texts = model("loss", None, *batch.alone)
    torch.testing.assert_close(losses["loss"], (total + of_texts) / (count + num_texts))
    assert recipe.weight(batch) == count + num_texts
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"text_data": tmp_path / "no"}, "--text-data must be a file with a text a line"),
        ({"text_share": 0.5}, "--text-share has no effect without --text-data, got 0.5"),
        ({"text_data": file, "text_share": 0.0}, r"--text-share must be in \(0, 1\], got 0.0"),
    )
    for flags, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            Simvlm(**flags).assets(data)


def test_a_question_is_cut_for_its_answer_and_what_is_written_loads(tmp_path: Path) -> None:
    recipe = replace(SimvlmVqa(), max_text=8)
    data = recipe.open_data()
    assets = recipe.assets(data)
    asked = ["is it an even digit or an odd digit, and why?", "which digit?"]
    found = recipe.prefixed(assets, ["seven", "eight"], asked, [0, 1])
    assert found.num_text.max() <= 8 and (found.num_text > found.num_prefix).all()
    words = assets.wordpiece
    behind = [row[a:b].tolist() for row, a, b in zip(found.tokens, found.num_prefix, found.num_text, strict=True)]
    assert [words.decode(row) for row in behind] == ["seven", "eight"]
    assert all(row[-1] == words.sep_token_id for row in behind)
    model = moved(recipe.build(assets))
    save_simvlm(model, tmp_path / "x")
    words.save(tmp_path / "x")
    again = load_simvlm(tmp_path / "x")
    assert again.config == model.config
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in model.state_dict().items())
    start = Simvlm(start=tmp_path / "x", max_text=8)
    of_start = start.assets(data)
    assert of_start.shape == model.config and start.initial(of_start, model).keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="--max-text must be at most 8 of --from, got 32"):
        Simvlm(start=tmp_path / "x").assets(data)
