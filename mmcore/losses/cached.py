"""Losses of a whole batch at the memory of a chunk (GradCache, arXiv:2101.06983), for any encoders in any loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcore.losses.ranks import Header, agree, world_size_of
from mmcore.ops import require

OP = "cached_contrastive_step"
Features = tuple[Tensor, ...]
Backward = Callable[[Tensor, bool], object]


def cached_contrastive_step(
    encoders: Callable[..., Any] | Sequence[Callable[..., Any] | None],
    inputs: Sequence[Any],
    *,
    loss: Callable[..., Tensor],
    chunk_size: int,
    modules: Sequence[nn.Module] | None = None,
    backward: Callable[[Tensor], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The loss of a batch and the gradient of the encoders, holding the activations of one chunk of each input at a
    time: `loss(*features).backward()` of the whole batch, in value and in gradient, for two forwards instead of one.

    ```
    for images, texts in loader:
        optimizer.zero_grad()
        value = cached_contrastive_step(model, [(images, texts)], loss=global_contrastive_loss, chunk_size=64)
        optimizer.step()
    ```

    Chunks are encoded without gradients, the loss and the gradients of all features are computed once, and each chunk
    is encoded again and sends its share back. Dropout draws the same numbers in both passes, and buffers, such as the
    running statistics of BatchNorm, are moved by the first alone (the batch that a BatchNorm normalises by is a chunk).
    With a loss of `mmcore.losses` the mean of the ranks' gradients, which DDP, FSDP2 and DeepSpeed form, is the
    gradient of one process on the whole batch; of DDP they are reduced once, with the last chunk.

    Args:
        encoders: one for each of `inputs`, or one for all; each gives a tensor of features `[B, ...]`, or a tuple of
            such tensors and of numbers `[1]`, such as a logit scale. None for inputs that are features already, which
            nothing learns from (a frozen encoder's, from a file).
        inputs: for each encoder a tensor or list of B rows, a tuple of them (arguments by position) or a mapping
            (by name); what has no rows, such as a flag, goes to every chunk. Inputs may differ in B, and ranks too.
        loss: of all features and numbers in the order of `inputs`. Parameters that it uses itself, such as a scale, get
            their gradient with the last chunk.
        chunk_size: rows that are encoded at a time, at least 1; the number of chunks is that of the rank with most.
        modules: what the encoders run: modules under DDP or FSDP2, or DeepSpeed's engine. None = the encoders, which
            then must be modules or their methods, and `()` = none of them is wrapped or has buffers.
        backward: of a scalar, in place of `Tensor.backward`: `accelerator.backward`, or
            `lambda x: scaler.scale(x).backward()`. None = that, or the engine's where DeepSpeed has the encoders.
        group: the data-parallel process group; None = the default one, or one process where none is set up.

    Returns:
        The loss, detached.

    Raises:
        ValueError: inputs whose rows differ, encoders that are not told by `modules`, features of another form, a loss
            that depends on nothing that learns; on every rank, where one refuses its arguments.

    Papers: arXiv:2101.06983 (GradCache).
    """

    def check() -> tuple[tuple[list[_Side], list[nn.Module]], Header]:
        require(
            OP, isinstance(chunk_size, int) and chunk_size >= 1, "chunk_size must be at least 1, got {}", chunk_size
        )
        sides = _sides(encoders, inputs)
        found = _modules([side.encoder for side in sides]) if modules is None else list(modules)
        engines = [x for x in found if hasattr(x, "zero_optimization_stage")]
        require(OP, len(engines) < 2, "modules must be in one engine of DeepSpeed, got {}", len(engines))
        return (sides, found), Header(0, 0, {"inputs": len(sides)})

    sides, found = check()[0] if world_size_of(group) == 1 else agree(OP, group, _device(group), check)[0]
    counts = num_chunks([side.num_rows for side in sides], chunk_size, group)
    chunks = [side.chunks(count) for side, count in zip(sides, counts, strict=True)]
    engine = next((x for x in found if hasattr(x, "zero_optimization_stage")), None)
    run: Callable[[Tensor], object] = backward or (Tensor.backward if engine is None else engine.backward)  # pyright: ignore[reportAssignmentType]
    step = CachedStep(chunks, loss, found)
    if not torch.is_grad_enabled():
        return step.loss
    with coalesced(found):
        step.backward(lambda x, _: run(x), partial(unreduced, found))
    return step.loss.detach()


def num_chunks(num_rows: Sequence[int], chunk_size: int, group: dist.ProcessGroup | None) -> list[int]:
    """Of each input, as many as the rank with most rows has: the forwards of FSDP2 and ZeRO-3 are collectives."""
    counts = [max(1, -(-rows // chunk_size)) for rows in num_rows]
    if world_size_of(group) > 1:
        of_ranks = torch.tensor(counts, device=_device(group))
        dist.all_reduce(of_ranks, op=dist.ReduceOp.MAX, group=group)
        counts = of_ranks.tolist()
    return counts


def split(num_rows: int, count: int) -> list[slice]:
    """Rows in `count` chunks as equal as can be."""
    return [slice(*bounds) for bounds in pairwise(num_rows * i // count for i in range(count + 1))]


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a process group's tensors are."""
    is_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """A forward of a chunk, which is taken twice; `learns` = False, once."""

    forward: Callable[[], Any]
    learns: bool = True

    def __call__(self) -> Features:
        found = self.forward()
        features = (found,) if isinstance(found, Tensor) else found
        is_known = isinstance(features, (tuple, list)) and all(isinstance(x, Tensor) for x in features)
        require(OP, is_known, "encoders must return a tensor or a tuple of them, got {}", type(found).__name__)
        return tuple(features)


class CachedStep:
    """The first half of a step: features of all chunks of each input, and the loss of them with their gradients.

    Args:
        sides: for each input its chunks, at least one.
        objective: of all features and numbers, in order, to the loss.
        modules: whose buffers the second pass leaves as the first has made them.
    """

    def __init__(
        self, sides: Sequence[Sequence[Run]], objective: Callable[..., Tensor], modules: Sequence[nn.Module] = ()
    ) -> None:
        self.sides, self.modules = sides, modules
        self.is_whole = all(len(side) == 1 for side in sides)
        self.others: list[tuple[Tensor, Tensor]] = []
        if self.is_whole:
            self.loss = objective(*[x for (run,) in sides for x in run()])
            return
        # of each side and chunk, and of each of its features
        self._random: list[list[RandomState]] = []
        leaves: list[Features] = []
        sizes: list[list[list[int]]] = []
        for side in sides:
            states, outputs = [], []
            for run in side:
                states.append(_random_state())
                with torch.no_grad():
                    outputs.append(run())
            self._random.append(states)
            leaves.append(_joined(outputs, wants_grad=side[0].learns and torch.is_grad_enabled()))
            sizes.append([[len(x) for x in of] if of[0].ndim > 1 else [] for of in zip(*outputs, strict=True)])
            del outputs
        torch.clear_autocast_cache()  # of weights that were cast without a gradient
        loss = objective(*[x for of in leaves for x in of])
        self.loss = loss.detach()
        if not torch.is_grad_enabled():
            return
        learned = [x for of in leaves for x in of if x.requires_grad]
        others = _others(loss, learned)
        gradients = torch.autograd.grad(loss, [*learned, *others], allow_unused=True)
        self.others = [(x, g) for x, g in zip(others, gradients[len(learned) :], strict=True) if g is not None]
        of_leaf = dict(zip(map(id, learned), gradients, strict=False))
        self._gradients = [
            [_shares(of_leaf.get(id(x)), counts, len(side)) for x, counts in zip(of, counts_of, strict=True)]
            for side, of, counts_of in zip(sides, leaves, sizes, strict=True)
        ]

    def backward(self, backward: Backward, hold: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """The second half: each chunk again, with its share of the gradient, `backward(scalar, is_last)`. The last
        chunks of all inputs are one backward; what comes before it is done within `hold()`."""
        if self.is_whole:
            backward(self.loss, True)
            return
        learning = [s for s, side in enumerate(self.sides) if side[0].learns]
        with _kept(self.modules):
            for s in learning:
                for i in range(len(self.sides[s]) - 1):
                    with hold():
                        backward(self._surrogate(s, i), False)
            last = [self._surrogate(s, len(self.sides[s]) - 1) for s in learning]
            last += [(x * g).sum() for x, g in self.others]
            require(OP, bool(last), "encoders must have something that learns, got {}", "none that does")
            backward(torch.stack([x.reshape(()) for x in last]).sum(), True)

    def _surrogate(self, side: int, chunk: int) -> Tensor:
        """A scalar whose gradient is that of the loss by way of this chunk's features."""
        with _replayed(self._random[side][chunk]):
            features = self.sides[side][chunk]()
        products = [(x * g[chunk]).sum() for x, g in zip(features, self._gradients[side], strict=True) if g]
        is_learned = bool(products) and any(x.requires_grad for x in products)
        what = "encoders[{}] must compute what the loss learns from: give what is frozen as features, with None, got {}"
        require(OP, is_learned, what, side, "features without a gradient")
        return torch.stack(products).sum()


def _joined(outputs: list[Features], *, wants_grad: bool) -> Features:
    """The features of all chunks as leaves, numbers of the model as the first chunk has them."""
    leaves = []
    for of in zip(*outputs, strict=True):
        shapes = {x.shape[1:] for x in of}
        what = "features of all chunks must differ in rows alone, got {}: pad the inputs to one length"
        require(OP, len(shapes) == 1, what, " and ".join(str(list(shape)) for shape in shapes))
        whole = (torch.cat(of) if of[0].ndim > 1 else of[0]).detach()
        leaves.append(whole.requires_grad_(wants_grad and whole.is_floating_point()))
    return tuple(leaves)


def _shares(gradient: Tensor | None, sizes: list[int], num_chunks: int) -> Sequence[Tensor]:
    """Of each chunk; a number of the model takes an equal share in each."""
    if gradient is None:
        return ()
    return gradient.split(sizes) if sizes else [gradient / num_chunks] * num_chunks


def _others(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Parameters that the loss depends on beside the features."""
    require(OP, loss.requires_grad, "loss must depend on features that learn, got {}", "a constant")
    known, seen, found, nodes = set(map(id, leaves)), set(), {}, [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of the nodes that gather a leaf's gradient
        if variable is not None and id(variable) not in known:
            found[id(variable)] = variable
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())


RandomState = tuple[Tensor, Tensor | None]


def _random_state() -> RandomState:
    """Of the CPU, and of the current GPU where one is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


@contextmanager
def _replayed(state: RandomState) -> Iterator[None]:
    of_cpu, of_gpu = state
    with torch.random.fork_rng([] if of_gpu is None else [torch.cuda.current_device()]):
        torch.set_rng_state(of_cpu)
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu)
        yield


@contextmanager
def _kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Leaves buffers that are part of a module's state as they were."""
    owners = {id(m): m for module in modules for m in module.modules()}.values()
    names = [(m, name) for m in owners for name in m._buffers if name not in m._non_persistent_buffers_set]
    saved = [(m, name, x.clone()) for m, name in names if (x := m._buffers[name]) is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for m, name, x in saved:
                m._buffers[name].copy_(x)  # pyright: ignore[reportOptionalMemberAccess]


@contextmanager
def unreduced(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keeps DDP, and DeepSpeed without ZeRO, from reducing gradients before the last chunk. FSDP2 reduces each: what it
    would hold is whole weights, and the sum is the same."""
    with ExitStack() as stack:
        for module in modules:
            is_wrapped = hasattr(module, "no_sync") and getattr(module, "zero_optimization_stage", int)() == 0
            if is_wrapped:
                stack.enter_context(module.no_sync())  # pyright: ignore[reportCallIssue]
        yield


@contextmanager
def coalesced(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Has ZeRO reduce the sum of all chunks' gradients, not each."""
    with ExitStack() as stack:
        for module in modules:
            if getattr(module, "zero_optimization_stage", int)() > 0:
                stack.enter_context(module.coalesce_grad_reduction())  # pyright: ignore[reportCallIssue]
        yield


@dataclass(frozen=True)
class _Side:
    """An encoder and what it is called with."""

    encoder: Callable[..., Any] | None
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    num_rows: int

    def chunks(self, count: int) -> list[Run]:
        of = split(self.num_rows, count)
        if self.encoder is None:
            return [Run(partial(tuple, [x[rows] for x in self.arguments]), learns=False) for rows in of]
        given, learns = [*self.arguments, *self.named.values()], True
        if isinstance(self.encoder, nn.Module):
            learns = any(p.requires_grad for p in self.encoder.parameters())
        learns = learns or any(isinstance(x, Tensor) and x.requires_grad for x in given)
        return [Run(partial(self._encode, rows), learns) for rows in of]

    def _encode(self, rows: slice) -> Any:
        assert self.encoder is not None
        arguments = [cut(x, rows, self.num_rows) for x in self.arguments]
        return self.encoder(*arguments, **{name: cut(x, rows, self.num_rows) for name, x in self.named.items()})


def _sides(encoders: Callable[..., Any] | Sequence[Callable[..., Any] | None], inputs: Sequence[Any]) -> list[_Side]:
    is_list = isinstance(inputs, (list, tuple)) and len(inputs) > 0
    require(OP, is_list, "inputs must be a list of what each encoder takes, got {}", type(inputs).__name__)
    given: list[Any] = list(encoders) if isinstance(encoders, (list, tuple)) else [encoders] * len(inputs)
    what = "encoders must be one, or {}, one for each input, got {}"
    require(OP, len(given) == len(inputs), what, len(inputs), len(given))
    sides = []
    for i, (encoder, x) in enumerate(zip(given, inputs, strict=True)):
        require(OP, encoder is None or callable(encoder), "encoders[{}] must be callable, got {!r}", i, encoder)
        named = dict(x) if isinstance(x, Mapping) else {}
        arguments = () if named else x if isinstance(x, tuple) else (x,)
        counts = [n for value in (*arguments, *named.values()) for n in rows_of(value)]
        require(OP, bool(counts), "inputs[{}] must have rows, got {}", i, type(x).__name__)
        require(OP, len(set(counts)) == 1, "inputs[{}] must have as many rows in all of its parts, got {}", i, counts)
        sides.append(_Side(encoder, arguments, named, counts[0]))
    return sides


def rows_of(x: Any) -> list[int]:
    """How many rows each tensor and list of an argument has; of what has none, nothing."""
    if isinstance(x, Mapping):
        return [n for value in x.values() for n in rows_of(value)]
    return [len(x)] if isinstance(x, list) or (isinstance(x, Tensor) and x.ndim > 0) else []


def cut(x: Any, rows: slice, num_rows: int) -> Any:
    """Some rows of an argument; what does not have `num_rows` of them stays as it is."""
    if isinstance(x, Mapping):
        return {name: cut(value, rows, num_rows) for name, value in x.items()}
    return x[rows] if rows_of(x) == [num_rows] else x


def _modules(encoders: Sequence[Callable[..., Any] | None]) -> list[nn.Module]:
    """What encoders run, of modules and of their methods; each once."""
    found = {}
    for i, encoder in enumerate(encoders):
        module = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
        what = "modules must say what encoders[{}] runs, which is no module, got None"
        require(OP, encoder is None or isinstance(module, nn.Module), what, i)
        if isinstance(module, nn.Module):
            found[id(module)] = module
    return list(found.values())
