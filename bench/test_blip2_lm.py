"""A step of BLIP-2's second stage at the Q-Former's real shapes, from pixels to all gradients, beside transformers'."""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig, OPTForCausalLM

from bench.case import Case, time_case
from bench.measure import assert_agrees, gemm_flops_per_s
from mmcore.data.loader import map_tensors
from mmcore.data.text.prompts import Prompted
from mmcore.labels import IGNORED
from mmcore.parts.language_weights import beside_language, language_weights
from mmcore.systems.blip2 import weights as blip2_weights
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.blip2.shapes import VIT_G
from mmcore.systems.blip2.steps import stage2_loss

PAD, LENGTH = 1, 32
# a layer of ViT-g's width: the tower is no part of what differs
TOWER = replace(VIT_G, num_layers=1, mlp_dim=64)


class Shape(NamedTuple):
    """Pairs, layers of the Q-Former, and the language model."""

    size: int
    num_layers: int
    opt: OPTConfig


# BLIP-2's Q-Former before OPT's smallest; a third of its layers before a smaller one
GPU = Shape(64, 12, OPTConfig(dropout=0.0))
CPU = Shape(
    2,
    4,
    OPTConfig(
        vocab_size=8192,
        hidden_size=512,
        ffn_dim=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        word_embed_proj_dim=512,
        dropout=0.0,
    ),
)


def ours(shape: Shape, dropout: float, device: torch.device) -> BLIP2LM:
    torch.manual_seed(0)
    qformer = QFormerConfig(num_layers=shape.num_layers, has_text=False, dropout=dropout, attention_dropout=dropout)
    language: Any = OPTForCausalLM(shape.opt)
    return BLIP2LM(TOWER, qformer, language).to(device).train()


def theirs(model: BLIP2LM, attention: str) -> Any:
    """transformers' with the weights of ours, and what BLIP-2 freezes frozen."""
    settings = blip2_weights.stage2_config(model, model.language_model.config.vocab_size - 1)
    vocab_size = settings["text_config"]["vocab_size"]
    state = blip2_weights.HF.write(beside_language(model)) | language_weights(model.language_model, vocab_size)
    config: Any = Blip2Config.from_dict(settings)
    config.qformer_config.hidden_dropout_prob = model.qformer.config.dropout
    config.qformer_config.attention_probs_dropout_prob = model.qformer.config.attention_dropout
    found: Any = Blip2ForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, attn_implementation=attention
    )
    found.requires_grad_(False)
    for part in (found.qformer, found.language_projection, found.vision_model.post_layernorm):
        part.requires_grad_(True)
    found.query_tokens.requires_grad_(True)
    return found.to(model.language_projection.weight.device).train()


def batch(shape: Shape, device: torch.device) -> tuple[Tensor, Prompted]:
    """Images, and captions of COCO's lengths, the longest of LENGTH tokens."""
    generator, size = torch.Generator().manual_seed(1), shape.size
    images = torch.randn(size, 3, TOWER.image_size, TOWER.image_size, generator=generator)
    num_text = torch.randint(10, 20, (size,), generator=generator)
    num_text[0] = LENGTH
    # the last of the vocabulary is transformers' place of an image
    tokens = torch.randint(4, shape.opt.vocab_size - 1, (size, LENGTH), generator=generator)
    tokens = tokens.masked_fill(torch.arange(LENGTH) >= num_text[:, None], PAD)
    asked = Prompted(tokens, torch.zeros_like(num_text), num_text, None)
    return images.to(device), map_tensors(lambda x: x.to(device), asked)


def our_step(model: BLIP2LM, images: Tensor, texts: Prompted) -> Tensor:
    model.zero_grad()
    loss = stage2_loss(model, images, texts)
    loss.backward()
    return loss.detach()


def their_step(model: Any, images: Tensor, texts: Prompted) -> Tensor:
    """As its users write it: the logits of every token, those of the image too."""
    size, num_queries, tokens = len(images), model.config.num_query_tokens, texts.tokens
    is_text = torch.arange(LENGTH, device=tokens.device) < texts.num_text[:, None]
    of_image = tokens.new_full((size, num_queries), model.config.image_token_index)
    model.zero_grad()
    loss = model(
        pixel_values=images,
        input_ids=torch.cat([of_image, tokens], 1),
        attention_mask=torch.cat([torch.ones_like(of_image), is_text.long()], 1),
        labels=torch.cat([torch.full_like(of_image, IGNORED), tokens.masked_fill(~is_text, IGNORED)], 1),
    ).loss
    loss.backward()
    return loss.detach()


# whose step it is, and transformers' attention of the model or None for ours
CONTENDERS: Mapping[str, tuple[str | None, Callable[[Any, Tensor, Prompted], Tensor]]] = {
    "mmcore": (None, our_step),
    "transformers, eager": ("eager", their_step),
    "transformers, sdpa": ("sdpa", their_step),
}


def step_flops(model: BLIP2LM, texts: Prompted) -> float:
    """Of the products of our step: the Q-Former and its projections forward and both gradients, the language model
    forward and the gradient of its input, its head on what is learned alone, the tower forward."""
    shape, opt, size = model.qformer.config, model.language_model.config, len(texts.tokens)
    width, queries, patches = shape.width, shape.num_queries, TOWER.num_patches + 1
    cross_layers = -(-shape.num_layers // shape.cross_every)
    layer = queries * (4 * width**2 + 2 * queries * width + 2 * width * shape.mlp_dim)
    cross = queries * (2 * width**2 + 2 * patches * width) + patches * 2 * TOWER.width * width
    qformer = shape.num_layers * layer + cross_layers * cross + queries * width * opt.hidden_size
    positions = queries + texts.num_text.double().mean().item()
    block = 4 * opt.hidden_size**2 + 2 * opt.hidden_size * opt.ffn_dim + positions * opt.hidden_size
    language = positions * opt.num_hidden_layers * block
    head = texts.num_text.double().mean().item() * opt.hidden_size * opt.vocab_size
    tower = TOWER.num_layers * (4 * TOWER.width**2 + 2 * TOWER.width * TOWER.mlp_dim + 2 * patches * TOWER.width)
    pixels = 3 * TOWER.patch_size**2 * TOWER.width
    return 2 * size * (3 * qformer + 2 * (language + head) + patches * (tower + pixels))


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = GPU if DEVICE.type == "cuda" else CPU


@functools.cache
def model(attention: str | None, dropout: float) -> Any:
    """Ours, or transformers' with its weights."""
    if attention is None:
        return ours(SHAPE, dropout, DEVICE)
    return theirs(model(None, dropout), attention)


@functools.cache
def inputs() -> tuple[Tensor, Prompted]:
    return batch(SHAPE, DEVICE)


def step(contender: str, dropout: float) -> Callable[[], Tensor]:
    attention, run = CONTENDERS[contender]
    return functools.partial(run, model(attention, dropout), *inputs())


@functools.cache
def gold() -> tuple[float, Tensor]:
    """The loss, and the gradient of the projection, by ours in float64, which tests hold to transformers'."""
    wide, (images, texts) = copy.deepcopy(model(None, 0.0)).double(), inputs()
    loss = our_step(wide, images.double(), texts)
    return loss.item(), wide.language_projection.weight.grad


@pytest.mark.parametrize("contender", CONTENDERS)
def test_blip2_stage2(benchmark: Any, device: torch.device, contender: str) -> None:
    rate = gemm_flops_per_s(2048, 768, 768, torch.float32, device)
    case = Case(
        group=f"blip2-stage2 B{SHAPE.size}-Q32-T{LENGTH}-P257-V{SHAPE.opt.vocab_size}",
        contender=contender,
        loss=step(contender, 0.1),
        wrt=(),
        mode="step",
        floor_s=step_flops(model(None, 0.1), inputs()[1]) / rate,
    )
    time_case(benchmark, device, case)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_all_compute_the_same_loss_and_gradient(contender: str) -> None:
    """As float64 does, without dropout."""
    loss = step(contender, 0.0)().item()
    expected, gradient = gold()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_agrees(model(CONTENDERS[contender][0], 0.0).language_projection.weight.grad, gradient)
