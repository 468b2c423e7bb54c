"""A model of transformers accelerated whole: its own loss and gradients, without logits; and restored."""

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from mmcore.integrations.transformers import accelerate, restore
from mmcore.integrations.whole_model import LazyLogits
from mmcore.nn import Linear
from tests.mmcore.integrations.reading_models import MODELS, TEXT
from tests.refusals import refuses


def llama(**more: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT | more)).train()
    return model, {"input_ids": torch.randint(3, 80, (3, 17), generator=torch.Generator().manual_seed(0))}


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    labels = inputs["input_ids"].clone()
    labels[:, :12] = -100
    return labels


def step(model: Any, inputs: dict[str, Tensor], **more: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs, labels=labels_of(inputs), **more)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_images_have_their_own_loss_and_gradients_without_logits(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.train().double().set_attn_implementation("eager")
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    theirs, expected = step(model, inputs)
    names, report = list(model.state_dict()), accelerate(model)
    ours, grads = step(model, inputs)
    assert not report.left and isinstance(ours.logits, LazyLogits) and ours.logits.value is None
    # transformers computes its softmax and its loss in float32
    torch.testing.assert_close(ours.loss, theirs.loss.double(), rtol=1e-6, atol=1e-6)
    assert grads.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())  # the bias of keys has none but rounding's
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-6 * largest, msg=key)
    torch.testing.assert_close(ours.logits + 0, theirs.logits, rtol=1e-4, atol=1e-6)
    restore(model)
    again, _ = step(model, inputs)
    assert type(again.logits) is Tensor and torch.equal(again.loss, theirs.loss)
    assert list(model.state_dict()) == names and model.config._attn_implementation == "eager"


def test_whoever_reads_logits_has_them_with_their_graph() -> None:
    model, inputs = llama()
    expected = model(**inputs).logits
    accelerate(model)
    logits = model(**inputs).logits
    assert logits.shape == expected.shape and logits.size(-1) == 80 and logits.ndim == 3 and len(logits) == 3
    assert "values" not in repr(logits) and logits.float().dtype == torch.float32
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    loss.backward()
    head: Any = model.lm_head
    assert head.weight.grad.abs().max() > 0
    torch.testing.assert_close(torch.cat([logits, logits]).detach(), torch.cat([expected, expected]).detach())
    with torch.no_grad():
        assert type(model(**inputs).logits) is Tensor
    assert type(model.eval()(**inputs).logits) is Tensor


def test_what_trainer_says_of_the_number_of_tokens_and_of_shifted_labels_counts() -> None:
    model, inputs = llama()
    more = {"num_items_in_batch": torch.tensor(20)}
    theirs, expected = step(model, inputs, **more)
    shifted = {"shift_labels": F.pad(labels_of(inputs), (0, 1), value=-100)[:, 1:].contiguous()}
    of_shifted = step(model, inputs, **shifted)[0].loss
    accelerate(model)
    ours, grads = step(model, inputs, **more)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(step(model, inputs, num_items_in_batch=20)[0].loss, theirs.loss)
    torch.testing.assert_close(grads["lm_head.weight"], expected["lm_head.weight"])
    torch.testing.assert_close(step(model, inputs, **shifted)[0].loss, of_shifted)
    words = inputs["input_ids"]
    other = model(**inputs, labels=words, ignore_index=5)  # no setting of ours: the logits are made
    wanted = words[:, 1:].masked_fill(words[:, 1:] == 5, -100).flatten()
    torch.testing.assert_close(other.loss, F.cross_entropy(other.logits[:, :-1].flatten(0, 1), wanted))


def test_adapters_and_copies_learn_as_before() -> None:
    model, inputs = llama()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    adapted: Any = peft.get_peft_model(model, config)
    theirs, expected = step(adapted, inputs)
    accelerate(adapted)
    twin = copy.deepcopy(adapted)
    for found in (adapted, twin):
        ours, grads = step(found, inputs)
        torch.testing.assert_close(ours.loss, theirs.loss)
        assert grads.keys() == expected.keys() and isinstance(ours.logits, LazyLogits)
    with torch.no_grad():
        twin.get_base_model().lm_head.weight.zero_()
    torch.testing.assert_close(step(adapted, inputs)[0].loss, theirs.loss)  # a copy has a head of its own
    restore(adapted)
    torch.testing.assert_close(step(adapted, inputs)[0].loss, theirs.loss)


def test_autocast_and_checkpointing_keep_the_loss_and_no_logits() -> None:
    model, inputs = llama()
    accelerate(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = step(model, inputs)
    assert isinstance(ours.logits.float(), LazyLogits) and ours.logits.value is None
    restore(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = step(model, inputs)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=2e-3, atol=0)


def test_heads_that_are_not_plain_stay() -> None:
    model, inputs = llama()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.mean()
    assert any("whose loss is its own" in x for x in accelerate(model).left)
    assert step(model, inputs)[0].logits.__class__ is Tensor
    restore(model)

    class Wide(nn.Linear):
        pass

    model.lm_head = Wide(32, 80, bias=False)
    report = accelerate(model)
    assert "left: head of LlamaForCausalLM, which is a Wide" in str(report)


def test_parts_can_be_left_out_and_mistakes_are_sentences() -> None:
    model, _ = llama()
    report = accelerate(model, attention=False, layers=False)
    assert len(report.changed) == 1 and model.config._attn_implementation == "sdpa"
    assert not any(isinstance(x, Linear) for x in model.modules())
    refuses("accelerate: model must not be accelerated already, got LlamaForCausalLM", accelerate, model)
    restore(model)
    refuses("restore: model must be accelerated, got LlamaForCausalLM", restore, model)
    refuses("accelerate: model must be of transformers, got Linear", accelerate, nn.Linear(2, 2))
