"""LoRA on LLaVA's language model, and activations that the backward computes again."""

import pytest
import torch
from torch import Tensor

from mmcore.parts.adapters import Lora, is_adapter
from mmcore.runs import load_weights
from mmcore.systems.llava.model import Llava, Trainable
from tests.distributed import languages
from tests.mmcore.nn_fixtures import kept_bytes
from tests.refusals import refuses

LORA = Lora(rank=2, alpha=6)


def model(lora: Lora | None, *, trainable: Trainable = "language", learned: bool = True) -> Llava:
    ours = languages.llava(trainable)
    if lora is not None:
        ours.add_adapters(lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if is_adapter(name) and learned:
                p.normal_(std=0.3)
    return ours.double()


def loss_of(ours: Llava) -> Tensor:
    tokens, labels, images, sizes = languages.llava_batch(0, range(2), ours.config)
    total, count = ours("loss", tokens, labels, images.double(), sizes)
    return total / count


def test_new_adapters_change_nothing() -> None:
    torch.testing.assert_close(loss_of(model(LORA, learned=False)), loss_of(model(None)), rtol=0, atol=0)


def test_a_layer_with_an_adapter_is_the_papers_formula_and_so_is_what_is_merged() -> None:
    ours = model(LORA)
    before = dict(model(None).language_model.named_parameters())
    adapted, expected = dict(ours.language_model.named_parameters()), loss_of(ours)
    ours.merge_adapters()
    after = dict(ours.language_model.named_parameters())
    assert after.keys() == before.keys() and not any(map(is_adapter, after))
    num_adapted = 0
    for name, x in before.items():
        stem = name.removesuffix("weight")
        b, a = (adapted.get(f"{stem}lora_{m}.default.weight") for m in "BA")
        if b is not None and a is not None:
            num_adapted += 1
            x = x + LORA.alpha / LORA.rank * b @ a
        torch.testing.assert_close(after[name], x, msg=name)
    assert num_adapted == 2 * 7  # layers, each with q, k, v, o, gate, up, down
    torch.testing.assert_close(loss_of(ours), expected)


@pytest.mark.parametrize(("trainable", "parts"), [("language", {"projector"}), ("all", {"projector", "visual"})])
def test_adapters_learn_and_the_weights_beside_them_do_not(trainable: Trainable, parts: set[str]) -> None:
    ours = model(LORA, trainable=trainable)
    loss_of(ours).backward()
    learned = {n for n, p in ours.named_parameters() if p.requires_grad}
    whole = {n.split(".")[0] for n in learned if not is_adapter(n)}
    assert whole - {"image_newline"} == parts and any(map(is_adapter, learned))
    for name, p in ours.named_parameters():
        assert (p.grad is not None) == (name in learned), name


def test_dropout_of_adapters_is_for_training_alone() -> None:
    ours = model(Lora(2, 6, 0.5))
    assert loss_of(ours) != loss_of(ours)
    ours.eval()
    assert loss_of(ours) == loss_of(ours)


def test_adapters_are_loaded_whole_or_not_at_all() -> None:
    state = {n: x for n, x in model(LORA).state_dict().items() if not n.startswith("language_head")}
    first = next(name for name in state if is_adapter(name))
    ours, without = languages.llava("language"), {n: x for n, x in state.items() if n != first}
    ours.add_adapters(LORA)
    load_weights(ours, state)
    assert all(torch.equal(x, ours.state_dict()[n].double()) for n, x in state.items() if is_adapter(n))
    refuses(f"names and shapes, got a difference in .*{first}", load_weights, ours, without)
    for lora in (None, Lora(3, 6)):
        other = languages.llava("language")
        if lora is not None:
            other.add_adapters(lora)
        refuses("names and shapes, got a difference in", load_weights, other, state)


def test_a_shape_that_no_adapter_has_is_refused() -> None:
    for fields, name in (((0, 1), "rank"), ((1, 0), "alpha"), ((1, 1, 1.0), "dropout")):
        refuses(f"Lora: {name} must be", Lora, *fields)


@pytest.mark.parametrize("lora", [None, Lora(2, 6, 0.5)], ids=["whole", "lora"])
@pytest.mark.parametrize("trainable", ["projector", "language", "all"])
def test_recomputed_activations_give_the_same_gradients_from_less_memory(trainable: Trainable, lora: Lora | None):
    found = []
    for enable in (False, True, False):
        ours = model(lora, trainable=trainable)
        ours.set_activation_checkpointing(not enable)
        ours.set_activation_checkpointing(enable)
        torch.manual_seed(2)
        kept, loss = kept_bytes(ours, lambda ours=ours: loss_of(ours))
        loss.backward()
        found.append((kept, {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}))
    (kept, expected), (less, grads), (again, _) = found
    assert less < 0.7 * kept and again == kept and grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], msg=name)
    assert not ours.eval().language_model.training
