"""A step of ALBEF and of BLIP at their published shapes with few layers, from pixels and tokens to all gradients,
beside the eager originals: their passes one by one, every image's keys and values anew in each, the logits of every
word, dense similarities with the whole queue. ALBEF's layers are torch's own products on our weights, BLIP's are
transformers' classes, tied as the authors tie them."""

import copy
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from bench.case import Case, time_case
from bench.measure import gemm_flops_per_s, paired_medians
from mmcore.fusion_recipe import FusionBatch
from mmcore.nn import FeatureQueue, Linear, MomentumEncoder, PostNormBlock
from mmcore.ops import CALLS_ONEDNN
from mmcore.parts.bert import BertEncoder
from mmcore.recipe import Step
from mmcore.systems.albef.model import ALBEF
from mmcore.systems.albef.recipe import Albef
from mmcore.systems.albef.shapes import ALBEF_CONFIGS
from mmcore.systems.blip.model import BLIP
from mmcore.systems.blip.recipe import LEAST_PROBABILITY, Blip
from mmcore.systems.blip.shapes import BLIP_CONFIGS
from mmcore.systems.blip.weights import SETTINGS, written
from mmcore.systems.moco.model import random_keys

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# a rank's batch and the published layers on a GPU; on two cores some seconds a step
SIZE, VISION_LAYERS, TEXT_LAYERS = (64, 12, 12) if DEVICE.type == "cuda" else (2, 2, 4)
LENGTH, ALPHA = 30, 0.4
Loss = Callable[[], Tensor]


class Pair(NamedTuple):
    """Two models of the same weights and their losses of the same batch."""

    ours: nn.Module
    our_loss: Loss
    their_loss: Loss
    clear: Callable[[], None]


def batch(size: int, image_size: int) -> FusionBatch:
    """Pixels and captions of COCO's lengths, 15 % of their words hidden."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, image_size, image_size, generator=generator)
    num_text = torch.randint(10, 20, (size,), generator=generator)
    num_text[0] = LENGTH
    is_there = torch.arange(LENGTH) < num_text[:, None]
    tokens = torch.randint(1000, 30000, (size, LENGTH), generator=generator).masked_fill(~is_there, 0)
    is_hidden = is_there & (torch.rand(size, LENGTH, generator=generator) < 0.15)
    is_hidden[:, 1] = True
    ids = torch.arange(size)
    parts = tokens.masked_fill(is_hidden, 103), tokens.masked_fill(~is_hidden, -100), ids, ids
    return FusionBatch(*(x.to(DEVICE) for x in (images, tokens, num_text, *parts)))


def companions(model: Any, size: int, width: int) -> dict[str, Any]:
    queues = {name: FeatureQueue(size, width) for name in ("images", "texts")}
    for seed, queue in enumerate(queues.values()):
        queue.enqueue(random_keys(size, width, seed))
    return {"teacher": MomentumEncoder(model, 0.995), **{name: x.to(DEVICE) for name, x in queues.items()}}


def dense_contrast(
    features: tuple[Tensor, Tensor], taught: tuple[Tensor, Tensor], queues: tuple[Tensor, Tensor], temperature: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """ALBEF's loss by whole matrices, and the similarities within the batch."""
    losses, near = [], []
    for own, own_m, other_m, queue in (
        (features[0], taught[0], taught[1], queues[1]),
        (features[1], taught[1], taught[0], queues[0]),
    ):
        everyone = torch.cat([other_m, queue]).T
        with torch.no_grad():
            right = torch.zeros(len(own), everyone.shape[1], device=own.device)
            right.fill_diagonal_(1)
            targets = ALPHA * (own_m @ everyone / temperature).softmax(1) + (1 - ALPHA) * right
        similarity = own @ everyone / temperature
        losses.append(-(similarity.log_softmax(1) * targets).sum(1).mean())
        near.append(similarity[:, : len(own)].detach())
    return (losses[0] + losses[1]) / 2, (near[0], near[1])


def drawn(near: tuple[Tensor, Tensor], least: float) -> tuple[Tensor, Tensor]:
    """A wrong image for each text and a wrong text for each image."""
    found = [((x.softmax(1) + least).fill_diagonal_(0)).multinomial(1)[:, 0] for x in reversed(near)]
    return found[0], found[1]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float, bias: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = F.dropout((scores if bias is None else scores + bias).softmax(-1), dropout)
    return (weights @ v).transpose(1, 2).flatten(2)


def eager_vit(vit: Any, images: Tensor) -> Tensor:
    x = vit.embed(images)
    for block in vit.transformer.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, -1)
        x = x + block.attn.out(attend(q, k, v, block.attn.num_heads, 0.0))
        x = x + block.mlp(block.norm2(x))
    return vit.norm_post(x)


def eager_bert(
    bert: BertEncoder, x: Tensor, num_text: Tensor, image: Tensor | None, layers: slice = slice(None)
) -> Tensor:
    if not x.is_floating_point():
        x = bert._embedded(x, 0)
    bias = torch.zeros(len(x), x.shape[1], device=x.device)
    bias = bias.masked_fill(torch.arange(x.shape[1], device=x.device) >= num_text[:, None], -1e4)[:, None, None]
    for block in bert.blocks[layers]:
        assert isinstance(block, PostNormBlock)
        q, k, v = block.attn.qkv(x).chunk(3, -1)
        x = block.attn_norm(x, block.attn.out(attend(q, k, v, block.attn.num_heads, block.attn.dropout, bias)))
        if block.cross is not None and image is not None:
            k, v = block.cross.kv(image).chunk(2, -1)
            y = attend(block.cross.q(x), k, v, block.cross.num_heads, block.cross.dropout)
            x = block.cross_norm(x, block.cross.out(y))
        x = block.mlp_norm(x, block.mlp(x))
    return x


def albef(dropout: float) -> Pair:
    torch.manual_seed(0)
    config, half = ALBEF_CONFIGS["base"], TEXT_LAYERS // 2
    text = replace(config.text, num_layers=TEXT_LAYERS, first_cross=half, dropout=dropout, attention_dropout=dropout)
    config = replace(config, vision=replace(config.vision, num_layers=VISION_LAYERS), text=text)
    ours = ALBEF(config).to(DEVICE).train()
    recipe = Albef(alpha=ALPHA, alpha_steps=1)
    data, known = batch(SIZE, config.vision.image_size), companions(ours, recipe.queue_size, config.embed_dim)
    theirs, taught = (as_torch(copy.deepcopy(x)) for x in (ours, known["teacher"].teacher))
    queues = known["images"].filled, known["texts"].filled

    def towers(model: Any) -> tuple[Tensor, ...]:
        states = eager_vit(model.visual, data.images)
        words = eager_bert(model.text, data.tokens, data.num_text, None, slice(0, half))
        image, text = model.vision_proj(states[:, 0]), model.text_proj(words[:, 0])
        return states, words, F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def their_loss() -> Tensor:
        states, words, *features = towers(theirs)
        with torch.no_grad():
            states_m, _, *features_m = towers(taught)
        temperature = theirs.temperature
        contrast, near = dense_contrast((features[0], features[1]), (features_m[0], features_m[1]), queues, temperature)
        fused = slice(half, None)
        right = eager_bert(theirs.text, words, data.num_text, states, fused)
        images, texts = drawn(near, 0.0)
        lengths = torch.cat([data.num_text, data.num_text[texts]])
        wrong = torch.cat([words, words[texts]]), lengths, torch.cat([states[images], states])
        wrong = eager_bert(theirs.text, *wrong, fused)
        matched = theirs.itm_head(torch.cat([right[:, 0], wrong[:, 0]]))
        is_right = (torch.arange(3 * SIZE, device=DEVICE) < SIZE).long()
        with torch.no_grad():
            soft = taught.text_head(eager_bert(taught.text, data.masked, data.num_text, states_m)).softmax(-1)
        logits = theirs.text_head(eager_bert(theirs.text, data.masked, data.num_text, states))
        hard = F.cross_entropy(logits.flatten(0, 1), data.labels.flatten())
        softly = -(logits.log_softmax(-1) * soft).sum(-1)[data.labels >= 0].mean()
        loss = contrast + F.cross_entropy(matched, is_right) + (1 - ALPHA) * hard + ALPHA * softly
        loss.backward()
        return loss.detach()

    return Pair(ours, our_step(ours, recipe, data, known), their_loss, lambda: cleared(ours, theirs))


def blip(dropout: float) -> Pair:
    torch.manual_seed(0)
    config = BLIP_CONFIGS["base"]
    text = replace(config.text, num_layers=TEXT_LAYERS, dropout=dropout, attention_dropout=dropout)
    config = replace(config, vision=replace(config.vision, num_layers=VISION_LAYERS), text=text)
    ours = BLIP(config).to(DEVICE).train()
    recipe = Blip(alpha=ALPHA, alpha_steps=1)
    data, known = batch(SIZE, config.vision.image_size), companions(ours, recipe.queue_size, config.embed_dim)
    settings, state = BlipConfig(**SETTINGS.write("bench", config)), written(ours)
    encoder: Any = BlipForImageTextRetrieval(settings)
    decoder: Any = BlipForConditionalGeneration(settings)
    for model in (encoder, decoder):
        model.load_state_dict({n: state[n] for n in model.state_dict()})
        model.to(DEVICE).train()
    taught = copy.deepcopy(encoder)
    own, of_encoder = decoder.text_decoder.bert, encoder.text_encoder
    own.embeddings = of_encoder.embeddings
    decoder.text_decoder.cls.predictions.decoder.weight = own.embeddings.word_embeddings.weight
    for layer, other in zip(own.encoder.layer, of_encoder.encoder.layer, strict=True):
        layer.crossattention, layer.intermediate, layer.output = other.crossattention, other.intermediate, other.output
    temperature = nn.Parameter(ours.temperature.detach().clone())
    queues = known["images"].filled, known["texts"].filled
    place = torch.arange(LENGTH, device=DEVICE)
    seen = (place < data.num_text[:, None]).long()

    def towers(model: Any) -> tuple[Tensor, Tensor, Tensor]:
        states = model.vision_model(data.images)[0]
        words = model.text_encoder(data.tokens, attention_mask=seen)[0]
        image, text = model.vision_proj(states[:, 0]), model.text_proj(words[:, 0])
        return states, F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def their_loss() -> Tensor:
        states, image, words = towers(encoder)
        with torch.no_grad():
            _, *features_m = towers(taught)
        contrast, near = dense_contrast((image, words), (features_m[0], features_m[1]), queues, temperature)
        tokens = ours.begun(data.tokens, config.encoder_token_id)
        right = of_encoder(tokens, attention_mask=seen, encoder_hidden_states=states)[0]
        images, texts = drawn(near, LEAST_PROBABILITY)
        wrong = {"attention_mask": torch.cat([seen, seen[texts]])}
        wrong["encoder_hidden_states"] = torch.cat([states[images], states])
        wrong = of_encoder(torch.cat([tokens, tokens[texts]]), **wrong)[0]
        matched = encoder.itm_head(torch.cat([right[:, 0], wrong[:, 0]]))
        is_right = (torch.arange(3 * SIZE, device=DEVICE) < SIZE).long()
        begun = ours.begun(data.tokens, config.decoder_token_id)
        labels = begun.masked_fill(seen == 0, -100)
        options = {"encoder_hidden_states": states, "labels": labels, "attention_mask": seen}
        loss = contrast + F.cross_entropy(matched, is_right) + decoder.text_decoder(begun, **options).loss
        loss.backward()
        return loss.detach()

    return Pair(ours, our_step(ours, recipe, data, known), their_loss, lambda: cleared(ours, encoder, decoder))


def our_step(model: Any, recipe: Any, data: FusionBatch, known: dict[str, Any]) -> Loss:
    def loss() -> Tensor:
        found = recipe.loss(model, data, Step(1, 1, 0, known))["loss"]
        found.backward()
        return found.detach()

    return loss


def as_torch(model: nn.Module) -> Any:
    """Its products by torch."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = MethodType(nn.Linear.forward, module)
    return model


def cleared(*models: nn.Module) -> None:
    for model in models:
        model.zero_grad()


SYSTEMS: dict[str, Callable[[float], Pair]] = {"albef": albef, "blip": blip}
ORIGINALS = {"albef": "eager, as ALBEF", "blip": "transformers, as BLIP"}


def runs(system: str, dropout: float) -> dict[str, Loss]:
    pair = SYSTEMS[system](dropout)

    def of(loss: Loss) -> Loss:
        def run() -> Tensor:
            pair.clear()
            return loss()

        return run

    return {"mmcore": of(pair.our_loss), ORIGINALS[system]: of(pair.their_loss)}


@pytest.mark.parametrize("contender", ["mmcore", "original"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_align_then_fuse(benchmark: Any, device: torch.device, system: str, contender: str) -> None:
    found = runs(system, 0.1)
    name = "mmcore" if contender == "mmcore" else ORIGINALS[system]
    case = Case(
        group=f"{system} B{SIZE}-V{VISION_LAYERS}-L{TEXT_LAYERS}-T{LENGTH}",
        contender=name,
        loss=found[name],
        wrt=(),
        mode="step",
        floor_s=step_flops(system) / gemm_flops_per_s(2048, 768, 768, torch.float32, device),
    )
    time_case(benchmark, device, case)


def step_flops(system: str) -> float:
    """Of the products of our step: the towers forward and both gradients, the momentum model's forward, each image's
    keys and values once, 3 B pairs, and what words are told from; the head over the words that count."""
    width, vocab = 768, 30_524
    places, fused = (257, TEXT_LAYERS // 2) if system == "albef" else (197, TEXT_LAYERS)

    def layers(rows: int, depth: int, reads: bool) -> float:
        attention = 4 * width**2 + 2 * LENGTH * width
        cross = 2 * width**2 + 2 * places * width if reads else 0
        return 2.0 * rows * depth * LENGTH * (attention + 8 * width**2 + cross)

    tower = 2.0 * SIZE * VISION_LAYERS * places * (12 * width**2 + 2 * places * width)
    keys_values = 2.0 * SIZE * fused * places * 2 * width**2
    alone, hidden = TEXT_LAYERS - fused, round(0.15 * LENGTH) if system == "albef" else LENGTH - 1
    head = 2.0 * SIZE * hidden * width * (width + vocab)
    words = layers(SIZE, alone, False) + layers(SIZE, fused, True) + head
    both = tower + layers(SIZE, alone or TEXT_LAYERS, False) + keys_values
    taught = both + (words if system == "albef" else 0) - (0 if system == "albef" else keys_values)
    return 3 * (both + layers(3 * SIZE, fused, True) + words) + taught


@pytest.mark.parametrize("system", SYSTEMS)
def test_both_compute_the_same_objectives(system: str) -> None:
    """But for the negatives, which each draws for itself."""
    ours, theirs = (run().item() for run in runs(system, 0.0).values())
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_is_ahead_of_the_eager_one(system: str) -> None:
    medians = paired_medians(runs(system, 0.1), 5, DEVICE)
    ratio = medians[ORIGINALS[system]] / medians["mmcore"]
    print(f"{system} step, {SIZE} pairs, {VISION_LAYERS} and {TEXT_LAYERS} layers: {medians}: {ratio:.2f}x")
    assert ratio >= (1.3 if CALLS_ONEDNN or DEVICE.type == "cuda" else 1.1)
