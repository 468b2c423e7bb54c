"""BLIP-2's first stage: parity with transformers, one pass against several, caches, names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

from mmcore.parts.vit import VisionConfig
from mmcore.systems.blip2.model import BLIP2, BLIP2Config
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.blip2.weights import HF, STAGE1_SETTINGS
from tests.refusals import refuses

QUERIES, LENGTH, VOCAB = 5, 7, 101
NUM_TEXT = torch.tensor([7, 3, 5])


def hf_config(qformer: dict[str, Any], **settings: Any) -> Blip2Config:
    """A small tower's and Q-Former's."""
    vision = Blip2VisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    small = Blip2QFormerConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=64, max_position_embeddings=20, **qformer
    )
    return Blip2Config(vision_config=vision.to_dict(), qformer_config=small.to_dict(), **settings)


def hf_model(dtype: torch.dtype = torch.float64) -> Blip2ForImageTextRetrieval:
    qformer = {"vocab_size": VOCAB, "num_hidden_layers": 4, "use_qformer_text_input": True}
    config = hf_config(qformer, num_query_tokens=QUERIES, image_text_hidden_size=16)
    torch.manual_seed(0)
    model = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    # what float32 holds, in the arithmetic of another dtype
    return model.double() if dtype == torch.float64 else model


def ours_of(theirs: Blip2ForImageTextRetrieval) -> BLIP2:
    config = STAGE1_SETTINGS.read("test", theirs.config.to_dict())
    model = BLIP2(config)
    model.load_state_dict(model.state_dict() | HF.read("test", theirs.state_dict(), model.state_dict()))
    return model.to(theirs.dtype).eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, VOCAB - 1, (3, LENGTH), generator=generator)
    return images, tokens.masked_fill(torch.arange(LENGTH) >= NUM_TEXT[:, None], 0), NUM_TEXT


@pytest.mark.parametrize("is_matching", [False, True], ids=["contrastive", "matching"])
def test_logits_and_the_gradients_of_all_that_learns_are_those_of_transformers(is_matching: bool) -> None:
    theirs = hf_model()
    ours, (images, tokens, num_text) = ours_of(theirs), batch()
    mask = (torch.arange(LENGTH) < num_text[:, None]).long()
    inputs = {"pixel_values": images, "input_ids": tokens, "attention_mask": mask}
    expected = theirs(**inputs, use_image_text_matching_head=is_matching).logits_per_image
    if is_matching:
        found = ours("match", None, images, torch.arange(3), tokens, num_text)
    else:
        found = (ours("encode_image", images) @ ours("encode_text", tokens, num_text).T).amax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    learned = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    grads = HF.write({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in learned.items()})
    parameters = {n: p for n, p in theirs.named_parameters() if n in grads}
    assert len(parameters) > 20
    for name, p in parameters.items():
        expected_grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grads[name], expected_grad, rtol=1e-6, atol=1e-9)


def test_one_pass_gives_what_separate_passes_and_a_cache_give() -> None:
    ours, (images, tokens, num_text) = ours_of(hf_model()), batch()
    pairs = ours("pairs", images, tokens, num_text, 0.1)
    torch.testing.assert_close(pairs.image, ours("encode_image", images))
    torch.testing.assert_close(pairs.text, ours("encode_text", tokens, num_text))
    caches = ours.qformer.new_caches()
    ours.qformer(ours.states(images), caches=caches)
    inputs = tokens.clone()
    inputs[:, 0] = ours.config.decoder_token_id

    def logits_at(t: int) -> Tensor:
        return ours.text_head(ours.qformer(tokens=inputs[:, t : t + 1], places=torch.tensor([t]), caches=caches))

    logits = torch.cat([logits_at(t) for t in range(LENGTH)], 1)
    labels = tokens.masked_fill(torch.arange(LENGTH) >= num_text[:, None], -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)
    assert pairs.num_tokens == num_text.sum() - 3
    torch.testing.assert_close(pairs.caption_loss / pairs.num_tokens, loss, rtol=1e-6, atol=0)


def test_keys_and_values_of_a_pass_serve_the_matching_of_any_pairs() -> None:
    ours, (images, tokens, num_text) = ours_of(hf_model()), batch()
    index, rows = torch.tensor([2, 0, 0, 1]), torch.tensor([0, 1, 2, 2])
    expected = ours("match", None, images[index], torch.arange(4), tokens[rows], num_text[rows])
    for num_kept in range(4):
        kept = ours("pairs", images[:num_kept], tokens[:num_kept], num_text[:num_kept]).keys_values
        found = ours("match", kept, images[num_kept:], index, tokens[rows], num_text[rows])
        torch.testing.assert_close(found, expected)


def test_the_image_tower_is_frozen_and_stays_in_evaluation() -> None:
    ours = ours_of(hf_model()).train()
    assert not any(p.requires_grad for p in ours.visual.parameters())
    assert not ours.visual.training and ours.qformer.training
    images, tokens, num_text = batch()
    pairs = ours("pairs", images, tokens, num_text)
    (pairs.image.sum() + pairs.text.sum() + pairs.caption_loss + pairs.temperature).backward()
    without = [n for n, p in ours.named_parameters() if p.requires_grad and p.grad is None]
    assert without == ["itm_head.weight", "itm_head.bias"]


def test_shapes_and_parts_that_do_not_fit_are_refused() -> None:
    refuses("^QFormerConfig: num_heads must divide width 768, got 5", QFormerConfig, num_heads=5)
    refuses("^QFormerConfig: num_queries must be at least 1, got 0", QFormerConfig, num_queries=0)
    refuses("^QFormerConfig: dropout must be from 0, below 1, got 1.0", QFormerConfig, dropout=1.0)
    refuses(r"^QFormerConfig: pad_token_id must be in \[0, 30523\), got -1", QFormerConfig, pad_token_id=-1)
    message = "BLIP2Config: qformer.image_width must be vision.width 768, got 1408"
    refuses(message, BLIP2Config, vision=VisionConfig())
    refuses("QFormer: image or tokens must be given, got neither", ours_of(hf_model()).qformer)
