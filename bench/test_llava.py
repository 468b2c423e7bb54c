"""A step of LLaVA-1.5's second stage on the lengths of its mix, ours on packed rows and transformers' on padded ones:
one set of weights, samples and labels."""

import functools
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration
from transformers import LlavaConfig as HFLlavaConfig

from bench.case import Case, time_case
from bench.llava_mix import CPU, GPU, MIX, Batch, Shape, batch
from bench.measure import gemm_flops_per_s, paired_medians, peak_extra_bytes
from mmcore.integrations.transformers import NAME, register
from mmcore.labels import IGNORED, IMAGE_TOKEN
from mmcore.parts.language_weights import beside_language, language_weights
from mmcore.systems.llava import weights as llava_weights
from mmcore.systems.llava.model import Llava, LlavaConfig


def ours(shape: Shape, device: torch.device) -> Llava:
    """Learns its projector and its language model."""
    register()
    torch.manual_seed(0)
    # `to` would round the frequencies of the positions as well
    language = AutoModelForCausalLM.from_config(shape.text, dtype=shape.dtype, attn_implementation=NAME)
    model = Llava(LlavaConfig(shape.vision), language, trainable="language")
    for part in (model.visual, model.projector):
        part.to(shape.dtype)
    return model.to(device).train()


def theirs(model: Llava, attention: str) -> Any:
    """transformers' LLaVA with the weights of ours, and what LLaVA freezes frozen."""
    vocab_size = model.language_model.config.vocab_size
    config = HFLlavaConfig.from_dict(llava_weights.hf_config(model, vocab_size - 1))
    found: Any = LlavaForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=llava_weights.hf_layout().write(beside_language(model))
        | llava_weights.unread_norm(model)
        | language_weights(model.language_model, vocab_size),
        dtype=model.language_model.dtype,
        attn_implementation=attention,
    )
    found.model.vision_tower.requires_grad_(False)
    return found.to(next(model.parameters()).device).train()


def packed_step(model: Llava, batch: Batch) -> Tensor:
    rows = batch.packed
    model.zero_grad()
    total, count = model.loss(rows.tokens, rows.labels, batch.packed_images, position_ids=rows.position_ids)
    return _backward(total / count)


def padded_step(model: Llava, batch: Batch) -> Tensor:
    """What packing brings is missing: a row for each conversation."""
    model.zero_grad()
    total, count = model.loss(batch.padded.tokens, batch.padded.labels, batch.padded_images)
    return _backward(total / count)


def stored_step(model: Llava, batch: Batch) -> Tensor:
    """What the loss brings is missing: the logits of every token, stored."""
    rows, head = batch.packed, model.language_model.get_output_embeddings()

    def loss(states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float().flatten(0, 1), labels.flatten(), reduction="sum")

    model.zero_grad()
    with patch.object(model.language_head, "forward", loss):
        total, count = model.loss(rows.tokens, rows.labels, batch.packed_images, position_ids=rows.position_ids)
    return _backward(total / count)


def transformers_step(model: Any, batch: Batch) -> Tensor:
    """As its users write it."""
    tokens, labels, num_text = batch.padded
    mask = torch.arange(tokens.shape[1], device=tokens.device) < num_text[:, None]
    model.zero_grad()
    found = model(
        input_ids=tokens.masked_fill(tokens == IMAGE_TOKEN, model.config.image_token_id),
        attention_mask=mask.long(),
        pixel_values=batch.padded_images,
        labels=labels,
    )
    return _backward(found.loss)


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


PACKED, EAGER = "mmcore, packed", "transformers, padded, eager"
# whose step it is, and transformers' attention of the model or None for ours
CONTENDERS: Mapping[str, tuple[str | None, Callable[[Any, Batch], Tensor]]] = {
    PACKED: (None, packed_step),
    "mmcore, padded": (None, padded_step),
    "mmcore, packed, logits stored": (None, stored_step),
    EAGER: ("eager", transformers_step),
    "transformers, padded, sdpa": ("sdpa", transformers_step),
}


def step_flops(shape: Shape, batch: Batch) -> float:
    """Of the products of our step without padding: the language model's forward and both gradients, its head on what is
    learned alone, the projector without a gradient of its input, the tower forward."""
    text, vision, num_images = shape.text, shape.vision, len(batch.padded_images)
    width, tower_width, positions = text.hidden_size, vision.width, vision.num_patches + 1
    kv_width = width * (text.num_key_value_heads or 0) // text.num_attention_heads
    layer = 2 * width**2 + 2 * width * kv_width + 3 * width * text.intermediate_size
    seen = sum(length * (length + 1) / 2 for length in batch.padded.num_text.tolist())
    language = 3 * text.num_hidden_layers * (batch.num_tokens * layer + 2 * seen * width)
    head = 3 * batch.num_learned * width * text.vocab_size
    block = 4 * tower_width**2 + 2 * tower_width * vision.mlp_dim + 2 * positions * tower_width
    tower = num_images * vision.num_layers * positions * block
    projector = num_images * vision.num_patches * (2 * tower_width * width + 3 * width**2)
    return 2 * (language + head + tower + projector)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = GPU if DEVICE.type == "cuda" else CPU


@functools.cache
def model(attention: str | None) -> Any:
    """Ours, or transformers' with its weights."""
    return ours(SHAPE, DEVICE) if attention is None else theirs(model(None), attention)


@functools.cache
def inputs() -> Batch:
    return batch(SHAPE, DEVICE)


def step(contender: str) -> Callable[[], Tensor]:
    attention, run = CONTENDERS[contender]
    return functools.partial(run, model(attention), inputs())


@pytest.mark.parametrize("contender", CONTENDERS)
def test_llava_stage2(benchmark: Any, device: torch.device, contender: str) -> None:
    text = SHAPE.text
    rate = gemm_flops_per_s(inputs().num_tokens, text.intermediate_size, text.hidden_size, SHAPE.dtype, device)
    case = Case(
        group=f"llava-stage2 {SHAPE.name}",
        contender=contender,
        loss=step(contender),
        wrt=(),
        mode="step",
        floor_s=step_flops(SHAPE, inputs()) / rate,
    )
    time_case(benchmark, device, case)
    if benchmark.enabled:
        num_tokens = inputs().num_tokens  # no padding among them
        benchmark.extra_info["tokens_per_s"] = num_tokens / benchmark.stats.stats.median


def test_the_mix_is_as_large_as_published() -> None:
    """In conversations and, at four bytes a token, 60 of JSON a message and 120 a conversation, about in bytes."""
    assert sum(part.conversations for part in MIX) == 665_298
    size = sum(part.conversations * (120 + part.rounds * (2 * 60 + 4 * (part.asked + part.answered))) for part in MIX)
    assert size == pytest.approx(1.03e9, rel=0.1)


def test_the_rows_hold_the_conversations_of_the_padded_batch() -> None:
    found = inputs()
    packed, padded = found.packed, found.padded
    for rows in (packed, padded):
        assert int(rows.num_text.sum()) == found.num_tokens
    texts = [rows.tokens[rows.tokens > 0].sort().values for rows in (packed, padded)]
    assert torch.equal(*texts) and int((packed.labels != IGNORED).sum()) == found.num_learned
    assert int((packed.tokens == IMAGE_TOKEN).sum()) == len(found.packed_images) * SHAPE.vision.num_patches
    shares = [f"{1 - found.num_tokens / rows.tokens.numel():.0%}" for rows in (packed, padded)]
    print(f"{found.num_tokens} tokens, {found.num_learned} learned; padding {shares[0]}, unpacked {shares[1]}")


def test_all_compute_the_same_loss_and_gradient() -> None:
    losses, gradients = {}, {}
    for name, (attention, _) in CONTENDERS.items():
        losses[name] = step(name)().item()
        found = model(attention)
        projector = found.projector[0] if attention is None else found.model.multi_modal_projector.linear_1
        gradients[name] = projector.weight.grad.clone()
    expected = gradients[EAGER]
    errors = {name: float((x - expected).norm() / expected.norm()) for name, x in gradients.items()}
    in_loss, in_gradient = (1e-5, 1e-4) if SHAPE.dtype == torch.float32 else (1e-2, 0.05)
    assert losses == pytest.approx(dict.fromkeys(losses, losses[EAGER]), rel=in_loss)
    assert max(errors.values()) <= in_gradient, errors


def test_a_packed_step_is_ahead_of_the_padded_one() -> None:
    """The step that users have, and what packing and the loss are of the difference."""
    medians = paired_medians({name: step(name) for name in CONTENDERS}, 5, DEVICE)
    print(f"llava-stage2 {SHAPE.name}, {inputs().num_tokens} tokens that are no padding:")
    for name, seconds in medians.items():
        print(f"  {name}: {inputs().num_tokens / seconds:.0f} tokens/s, {seconds / medians[PACKED]:.2f}x the time")
    assert medians[EAGER] / medians[PACKED] >= (1.4 if DEVICE.type == "cuda" else 1.5)


def test_the_loss_takes_less_than_half_the_memory() -> None:
    """From the last states to their gradient and that of the head."""
    ours_, theirs_ = model(None), model("eager")

    def states(tokens: Tensor) -> Tensor:
        made = torch.zeros(*tokens.shape, SHAPE.text.hidden_size, device=DEVICE, dtype=SHAPE.dtype)
        return made.requires_grad_()

    def run_ours() -> None:
        rows = inputs().packed
        ours_.zero_grad()
        ours_.language_head(states(rows.tokens)[:, :-1], rows.labels[:, 1:]).backward()

    def run_theirs() -> None:
        rows = inputs().padded
        theirs_.zero_grad()
        logits = theirs_.lm_head(states(rows.tokens))
        theirs_.loss_function(logits, rows.labels, SHAPE.text.vocab_size).backward()

    ours_peak, theirs_peak = (peak_extra_bytes(run, DEVICE) for run in (run_ours, run_theirs))
    if ours_peak is None or theirs_peak is None:
        pytest.skip("this system does not tell peak memory")
    print(f"llava-stage2 loss: {ours_peak / 2**20:.0f} MiB, transformers' {theirs_peak / 2**20:.0f} MiB")
    assert 2 * ours_peak <= theirs_peak
