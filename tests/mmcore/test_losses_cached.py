"""Cached steps in one process: the loss and the gradient of the whole batch, and the memory of a chunk."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmcore.losses import cached_contrastive_step
from mmkernels import contrastive_loss
from tests.distributed import cached
from tests.distributed.test_cached import whole

NAMES = ["pairs", "pairs by name", "two inputs"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk_size", [1, 3, cached.NUM - 1, cached.NUM, 100])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_any_size_give_the_gradient_of_the_whole(name: str, chunk_size: int) -> None:
    model = cached.Encoder()
    encoders, inputs, loss = cached.cases(model, model.logit_scale, slice(None))[name]
    value = cached_contrastive_step(encoders, inputs, loss=loss, chunk_size=chunk_size, modules=[model])
    expected, of_whole = whole(name)
    assert not value.requires_grad and abs(value - expected) < 1e-12
    found = gradients(model)
    assert found.keys() == of_whole.keys()
    for parameter, grad in of_whole.items():
        assert (found[parameter] - grad).abs().max() < 1e-12, parameter


def of_two(x: Tensor, y: Tensor) -> Tensor:
    return contrastive_loss(x, y, 5.0)


def test_texts_as_lists_one_encoder_for_all_inputs_and_features_that_are_there_already() -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(256, 6).double()

    class OfTexts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = bag

        def forward(self, texts: list[str]) -> Tensor:
            return torch.cat([self.bag(torch.tensor([list(text.encode())])) for text in texts])

    queries, answers = [f"what is {i}" for i in range(7)], [f"it is {i * i}" for i in range(7)]
    encoder, constant = OfTexts(), torch.randn(7, 6, dtype=torch.float64)

    def loss(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return of_two(x, y) + of_two(x, z)

    step = partial(cached_contrastive_step, loss=loss, chunk_size=2)
    value = step([encoder, encoder, None], [queries, answers, constant])
    found = gradients(bag)
    bag.zero_grad()
    expected = loss(encoder(queries), encoder(answers), constant)
    expected.backward()
    assert (value - expected).abs() < 1e-12 and (found["weight"] - gradients(bag)["weight"]).abs().max() < 1e-12
    bag.zero_grad()
    cached_contrastive_step(encoder, [queries, answers], loss=of_two, chunk_size=3)
    assert (gradients(bag)["weight"] != 0).any()


def test_a_frozen_encoder_runs_once_and_gets_no_gradient() -> None:
    torch.manual_seed(0)
    learned, frozen, calls = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False), []
    frozen.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.randn(2, 6, 4)
    cached_contrastive_step([learned, frozen], [x, y], loss=of_two, chunk_size=2)
    found = gradients(learned)
    assert len(calls) == 3 and frozen.weight.grad is None
    learned.zero_grad()
    of_two(learned(x), frozen(y)).backward()
    for name, grad in gradients(learned).items():
        torch.testing.assert_close(found[name], grad)


class Chunked(nn.Module):
    """What a cached step of dropout and BatchNorm has to equal: all chunks in one graph."""

    def __init__(self, body: nn.Module, chunk: int) -> None:
        super().__init__()
        self.body, self.chunk = body, chunk

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(part) for part in x.split(self.chunk)])


def test_dropout_is_drawn_once_and_running_statistics_are_moved_once() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()

    x, y = torch.randn(2, 8, 4, dtype=torch.float64)
    ours, theirs = make(), make()
    torch.manual_seed(1)
    cached_contrastive_step(ours, [x, y], loss=of_two, chunk_size=2)
    after = torch.rand(1)
    torch.manual_seed(1)
    chunked = Chunked(theirs, 2)
    of_two(chunked(x), chunked(y)).backward()
    assert torch.rand(1) == after, "random numbers go on where the first pass left them"
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and (p.grad - q.grad).abs().max() < 1e-12, name
    for (name, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(p, q), name


def test_autocast_and_a_scaled_backward() -> None:
    torch.manual_seed(0)
    encoder, (x, y) = nn.Linear(16, 8), torch.randn(2, 9, 16)
    found = []
    for chunk_size in (9, 2):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            step = partial(cached_contrastive_step, encoder, [x, y], loss=of_two, chunk_size=chunk_size)
            step(backward=lambda loss: (4 * loss).backward())
        found.append(gradients(encoder)["weight"])
    assert (found[0] - found[1]).abs().max() < 0.02 * found[0].abs().max() and found[0].abs().max() > 0


def test_an_evaluation_has_no_second_pass() -> None:
    encoder, (x, y) = nn.Linear(4, 3), torch.randn(2, 6, 4)
    with torch.no_grad():
        value = cached_contrastive_step(encoder, [x, y], loss=of_two, chunk_size=2)
    assert encoder.weight.grad is None
    torch.testing.assert_close(value, of_two(encoder(x), encoder(y)).detach())


class Held(TorchDispatchMode):
    """Bytes of the tensors that are alive beside those given, and the most of them."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {x.untyped_storage()._cdata for x in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self.known:
                size = x.untyped_storage().nbytes()
                self.known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(x.untyped_storage(), self.free, key, size)
        return result

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_a_batch_of_65536_takes_the_memory_of_a_chunk_and_of_the_features() -> None:
    """On tensors without storage, beside weights and inputs; a product stands for the loss, which keeps no more."""
    num, width, hidden, chunk = 65536, 512, 4096, 1024
    with torch.device("meta"):
        encoder = nn.Sequential(nn.Linear(768, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        encoder.append(nn.Linear(hidden, width))
        x, y = torch.empty(num, 768), torch.empty(num, 768)
    of_chunk = 4 * chunk * (4 * hidden + width)  # what backward needs of each layer
    weights, features = sum(4 * p.numel() for p in encoder.parameters()), 4 * num * width

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return (image * text).sum()

    with Held(x, y, *encoder.parameters()) as seen:
        cached_contrastive_step(encoder, [x, y], loss=loss, chunk_size=chunk)
    # both inputs' features and their gradients; then a chunk of each input, and the gradients of weights
    assert seen.most < max(5 * features, 2 * features + 4 * of_chunk + 2 * weights) + 2**20
    assert 2 * 4 * num * 4 * hidden > 10 * seen.most, "the whole batch's activations are far more"


@pytest.mark.parametrize(("arguments", "said"), [
    ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ({"inputs": torch.ones(3, 4)}, "inputs must be a list of what each encoder takes, got Tensor"),
    ({"encoders": [nn.Linear(4, 3)] * 3}, "encoders must be one, or 2, one for each input, got 3"),
    ({"encoders": [lambda x: x, None]}, "modules must say what encoders[0] runs, which is no module, got None"),
    ({"inputs": [3, torch.ones(3, 4)]}, "inputs[0] must have rows, got int"),
    ({"encoders": [lambda x: {"x": x}] * 2, "modules": ()}, "must return a tensor or a tuple of them, got dict"),
    ({"encoders": [nn.Linear(4, 3), lambda x: x[:, :3]], "modules": ()}, "encoders[1] must compute what the loss"),
    ({"encoders": [None, None]}, "loss must depend on features that learn, got a constant"),
    ({"encoders": [lambda x: x[:, : int(x[0, 0])], None], "modules": ()}, "must differ in rows alone, got"),
])  # fmt: skip
def test_a_mistake_is_a_sentence(arguments: dict[str, Any], said: str) -> None:
    inputs = [1 + torch.arange(12.0).view(3, 4), torch.ones(3, 4)]
    given: dict[str, Any] = {"encoders": nn.Linear(4, 3), "inputs": inputs, "chunk_size": 1, **arguments}

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return of_two(x, y)

    call: Callable[..., Tensor] = cached_contrastive_step
    with pytest.raises(ValueError) as error:
        call(given.pop("encoders"), given.pop("inputs"), loss=loss, **given)
    assert said in str(error.value)
