"""Captions of BLIP-2: caches against full passes, beam search against all texts and transformers, the nucleus."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mmcore.ops import masks
from mmcore.parts.decoding import Step, beam_search, nucleus
from mmcore.parts.vit import VisionConfig
from mmcore.systems.blip2.model import BLIP2, BLIP2Config
from mmcore.systems.blip2.qformer import QFormerConfig
from tests.refusals import refuses

PAD, EOS = 0, 1
MAX_TEXT = 12


def tiny(vocab_size: int, seed: int = 0) -> BLIP2:
    vision = VisionConfig(image_size=16, patch_size=8, width=24, num_layers=1, num_heads=2, mlp_dim=32)
    qformer = QFormerConfig(
        num_queries=3, width=16, num_layers=3, num_heads=2, mlp_dim=32, image_width=24, vocab_size=vocab_size,
        max_text=MAX_TEXT, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = BLIP2(BLIP2Config(vision, qformer, embed_dim=8, decoder_token_id=vocab_size - 1))
    with torch.no_grad():
        # texts that depend on the image and on what was said before
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(std=1.0 if "text.position" in name else 0.4)
    return model.double().eval()


def images_of(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64)


def next_log_probs(model: BLIP2, images: Tensor, texts: Tensor) -> Tensor:
    """Of what follows texts [B, T], by one pass over queries and texts, without caches."""
    start = torch.full_like(images[:, :1, 0, 0], model.config.decoder_token_id, dtype=torch.int64)
    inputs = torch.cat([start, texts], 1)
    num_text = torch.full((len(inputs),), inputs.shape[1])
    mask = masks.qformer_itg(model.config.qformer.num_queries, num_text, inputs.shape[1])
    with torch.no_grad():
        return model.text_head(model.qformer(model.states(images), inputs, mask=mask)[:, -1]).log_softmax(1)


def padded(texts: Sequence[Sequence[int]]) -> Tensor:
    longest = max(len(text) for text in texts)
    return torch.tensor([[*text, *[PAD] * (longest - len(text))] for text in texts])


def greedy_text(model: BLIP2, image: Tensor, max_length: int, eos: int) -> tuple[int, ...]:
    text: tuple[int, ...] = ()
    while len(text) < max_length and eos not in text:
        found = next_log_probs(model, image, torch.tensor([text], dtype=torch.int64))
        text = (*text, int(found.argmax()))
    return text


def step_of_texts(logits_of: Any) -> Step:
    """The step of a model that reads whole texts."""
    texts: Tensor | None = None

    def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
        nonlocal texts
        before = tokens.new_empty(len(tokens), 0) if texts is None else texts if rows is None else texts[rows]
        texts = torch.cat([before, tokens[:, None]], 1)
        return logits_of(texts)

    return step


class TestGreedy:
    def test_tokens_are_the_likeliest_of_full_passes_without_caches(self) -> None:
        model, images = tiny(60), images_of(6)
        unended = model.generate(images, max_length=MAX_TEXT, eos_token_id=PAD)
        # an end that rows meet at different places, or never
        eos = int(unended[0, 8])
        expected = [greedy_text(model, image[None], MAX_TEXT, eos) for image in images]
        assert len({len(text) for text in expected}) > 2 and len(set(expected)) == 6
        found = model.generate(images, max_length=MAX_TEXT, eos_token_id=eos)
        assert found.dtype == torch.int64 and torch.equal(found, padded(expected))

    def test_states_of_the_tower_and_a_forward_by_name_give_the_same(self) -> None:
        model, images = tiny(60), images_of(3)
        expected = model.generate(images, max_length=8, eos_token_id=EOS)
        found = model("generate", model.tower(images), max_length=8, eos_token_id=EOS)
        assert torch.equal(found, expected) and not found.requires_grad


class TestBeamSearch:
    @pytest.mark.parametrize(("num_beams", "eos"), product([2, 3, 5], [5, 8, 15]))
    def test_caches_follow_their_beams(self, num_beams: int, eos: int) -> None:
        model, images = tiny(20, seed=2), images_of(5)
        of_beams = images.repeat_interleave(num_beams, 0)
        start, options = torch.full((5,), model.config.decoder_token_id), {"num_beams": num_beams, "eos_token_id": eos}
        step = step_of_texts(lambda texts: next_log_probs(model, of_beams, texts[:, 1:]))
        expected = beam_search(step, start, max_length=8, pad_token_id=PAD, **options)
        found = model.generate(images, max_length=8, num_beams=num_beams, eos_token_id=eos)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(("num_beams", "seed"), product([2, 3, 8], range(4)))
    def test_texts_are_those_of_transformers(self, num_beams: int, seed: int) -> None:
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        theirs: Any = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(0.8 * torch.randn_like(p))
        # transformers takes a padding id of 0 for none
        start, pad = torch.arange(2, 10), 10
        expected = theirs.generate(
            start[:, None], attention_mask=torch.ones(8, 1, dtype=torch.int64), num_beams=num_beams,
            early_stopping="never", max_new_tokens=9, eos_token_id=EOS, pad_token_id=pad, do_sample=False,
        )  # fmt: skip
        step = step_of_texts(lambda texts: theirs(texts).logits[:, -1])
        options = {"num_beams": num_beams, "max_length": 9, "eos_token_id": EOS, "pad_token_id": pad}
        with torch.no_grad():
            found = beam_search(step, start, **options)
        assert torch.equal(found, expected[:, 1:]) and len(set(map(tuple, found.tolist()))) > 4


class TestNucleus:
    PROBABILITIES = torch.tensor([0.05, 0.4, 0.02, 0.3, 0.23], dtype=torch.float64)

    @pytest.mark.parametrize(("top_p", "temperature", "inside"), [
        (0.1, 1.0, [1]), (0.39, 1.0, [1]), (0.41, 1.0, [1, 3]), (0.71, 1.0, [1, 3, 4]), (1.0, 1.0, [0, 1, 2, 3, 4]),
        (1.0, 0.5, [0, 1, 2, 3, 4]),
    ])  # fmt: skip
    def test_tokens_come_as_often_as_their_share_of_the_nucleus(self, top_p: float, temperature: float, inside) -> None:
        generator = torch.Generator().manual_seed(2)
        logits = self.PROBABILITIES.log().expand(40_000, -1)
        drawn = nucleus(logits, top_p=top_p, temperature=temperature, generator=generator)
        powers = self.PROBABILITIES ** (1 / temperature)
        expected = torch.zeros(5, dtype=torch.float64)
        expected[inside] = powers[inside] / powers[inside].sum()
        assert drawn.unique().tolist() == inside
        # five standard deviations of a share among 40,000 draws
        torch.testing.assert_close(drawn.bincount(minlength=5) / 40_000, expected.float(), rtol=0, atol=5 * 0.5 / 200)

    def test_the_same_seed_gives_the_same_captions_and_another_seed_others(self) -> None:
        model, images = tiny(60), images_of(4)
        options: dict[str, Any] = {"max_length": 8, "eos_token_id": EOS}

        def captions(seed: int, top_p: float = 0.9) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return model.generate(images, top_p=top_p, temperature=1.5, generator=generator, **options)

        assert torch.equal(captions(5), captions(5)) and not torch.equal(captions(5), captions(6))
        greedy = model.generate(images, **options)
        assert torch.equal(captions(7, top_p=1e-6), greedy) and not torch.equal(captions(5), greedy)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"top_p": 0.5}])
def test_rows_that_ended_stay_padded(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    found = tiny(20, seed=2).generate(images_of(16), max_length=10, eos_token_id=8, **options)
    is_end = (found == 8).int()
    has_ended = is_end.cumsum(1) - is_end > 0
    lengths = (~has_ended).sum(1)
    assert len(lengths.unique()) > 2 and lengths.max() == found.shape[1] and (found[has_ended] == PAD).all()


@pytest.mark.parametrize(("options", "message"), [
    ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ({"top_p": 0.9, "num_beams": 2}, "top_p must be None with num_beams 2, got 0.9"),
    ({"top_p": 0.9, "temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ({"temperature": 0.7}, "temperature must be 1 without top_p, got 0.7"),
    ({"generator": torch.Generator()}, "generator must be None without top_p, got one"),
    ({"max_length": 0}, r"max_length must be in \[1, 12\], got 0"),
    ({"max_length": 13}, r"max_length must be in \[1, 12\], got 13"),
    ({"eos_token_id": 60}, r"eos_token_id must be in \[0, 60\), got 60"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"max_length": 5, "eos_token_id": EOS, **options}
    refuses(f"^BLIP2.generate: {message}", tiny(60).generate, images_of(1), **given)
