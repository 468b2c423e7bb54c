"""BLIP-2's second stage: parity with transformers, what is learned and what is frozen, rows without an image."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, LlamaConfig, OPTConfig, Qwen2Config, T5Config

from mmcore.parts.language_weights import LANGUAGE, beside_language
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.blip2.weights import HF, PARTS_SETTINGS
from tests.refusals import refuses
from tests.systems.blip2.test_model import hf_config, hf_model, ours_of

QUERIES, LENGTH, VOCAB = 4, 6, 60
TEXT: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
SMALL: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "opt": OPTConfig(**TEXT, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, dropout=0.0),
    "llama": LlamaConfig(**TEXT, **SMALL, num_key_value_heads=2),
    "qwen": Qwen2Config(**TEXT, **SMALL, num_key_value_heads=2),
    "t5": T5Config(**T5),
}


def pair(name: str) -> tuple[BLIP2LM, Any]:
    """Ours and transformers' with the same weights."""
    config = hf_config(
        {"num_hidden_layers": 2}, text_config=MODELS[name].to_dict(), num_query_tokens=QUERIES,
        image_token_index=VOCAB - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs: Any = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    parts = PARTS_SETTINGS.read("test", theirs.config.to_dict())
    ours = BLIP2LM(**parts, language_model=theirs.language_model)
    state = {n: x for n, x in theirs.state_dict().items() if not n.startswith(LANGUAGE)}
    ours.load_state_dict(HF.read("test", state, beside_language(ours)), strict=False)
    return ours.double().eval(), theirs.double()


def ours_float(name: str) -> BLIP2LM:
    return pair(name)[0].float()


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    num_prompt, num_text = torch.tensor([2, 1, 3]), torch.tensor([6, 3, 5])
    tokens = torch.randint(4, VOCAB - 1, (3, LENGTH), generator=generator)
    return images, tokens.masked_fill(torch.arange(LENGTH) >= num_text[:, None], 1), num_prompt, num_text


@pytest.mark.parametrize("name", ["opt", "llama", "qwen"])
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    ours, theirs = pair(name)
    images, tokens, num_prompt, num_text = batch()
    place = torch.arange(LENGTH)
    labels = tokens.masked_fill((place < num_prompt[:, None]) | (place >= num_text[:, None]), -100)
    ids = torch.cat([torch.full((3, QUERIES), VOCAB - 1), tokens], 1)
    seen = torch.cat([torch.ones(3, QUERIES), (place < num_text[:, None])], 1).long()
    wanted = torch.cat([torch.full((3, QUERIES), -100), labels], 1)
    expected = theirs(pixel_values=images, input_ids=ids, attention_mask=seen, labels=wanted).loss
    expected.backward()
    total, count = ours.loss(images, tokens, num_prompt, num_text)
    assert int(count) == int((num_text - num_prompt).sum())
    # transformers takes its logits to float32
    torch.testing.assert_close((total / count).float(), expected, rtol=1e-6, atol=0)
    (total / count).backward()
    theirs_named = dict(theirs.named_parameters())
    learned = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    for n, grad in HF.write({n: grad for n, grad in learned.items() if grad is not None}).items():
        torch.testing.assert_close(grad, theirs_named[n].grad, rtol=1e-5, atol=1e-7)
    assert not [n for n, grad in learned.items() if grad is None]


def test_an_encoder_decoder_learns_its_targets() -> None:
    ours, theirs = pair("t5")
    images, tokens, _, num_text = batch()
    targets = torch.randint(2, VOCAB - 1, (3, 4)).masked_fill(torch.tensor([[0, 0, 0, 1]]).bool(), -100)
    ids = torch.cat([torch.full((3, QUERIES), VOCAB - 1), tokens], 1)
    seen = torch.cat([torch.ones(3, QUERIES), (torch.arange(LENGTH) < num_text[:, None])], 1).long()
    expected = theirs(pixel_values=images, input_ids=ids, attention_mask=seen, labels=targets).loss
    total, count = ours.loss(images, tokens, num_text, num_text, targets)
    torch.testing.assert_close(total / count, expected, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="BLIP2LM: targets must be given to an encoder-decoder, got None"):
        ours.loss(images, tokens, num_text, num_text)


def test_stage_1_is_its_start() -> None:
    stage1, images = ours_of(hf_model(torch.float32)), torch.randn(2, 3, 32, 32)
    vision, qformer, language = stage1.config.vision, stage1.config.qformer, pair("opt")[0].language_model
    ours = BLIP2LM(vision, replace(qformer, has_text=False), language)
    ours.load_state_dict(ours.fitting(stage1.state_dict()), strict=False)
    with torch.no_grad():
        found = ours.eval().qformer(ours.norm_vision(ours.visual(images)))
        torch.testing.assert_close(found, stage1.qformer(stage1.states(images)))
    refuses("BLIP2LM: qformer must be without text, got has_text True", BLIP2LM, vision, qformer, language)
    other = BLIP2LM(vision, QFormerConfig(has_text=False, image_width=vision.width, num_layers=6), language)
    message = "BLIP2LM: state must have this model's weights, got a difference in"
    refuses(message, other.fitting, stage1.state_dict())
