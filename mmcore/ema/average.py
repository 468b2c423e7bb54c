"""The exponential moving average of a model's weights, kept in float32 beside it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcore.ema.schedules import Schedule, check_decay
from mmcore.ema.watch import kept_buffers, overwrite, tensors_of
from mmcore.ema.weights import Whole, averaged_buffers, is_engine, unwrapped, weights_of
from mmcore.ema.zero import Shards
from mmcore.ops import ema_update_, require
from mmcore.tensor_file import Layout, read_layout, read_tensors, write_tensors

# Of a saved file: the number of updates, which is also what tells it from others.
_COUNT = "mmcore.ema.num_updates"


class EMA:
    """`average = decay average + (1 - decay) weight` of all trainable weights, in one launch an update.

    ```
    ema = EMA(model, 0.9999)
    for batch in batches:
        ...
        optimizer.step()
        ema.update()
    with ema.swapped():
        evaluate(model)
    ```

    Under ZeRO each rank averages its own fp32 weights, without communication. `swapped`, `copy_to`, `gathered` and
    `save` are then collective: every rank calls them. With a teacher all else is too, and `update` gathers it.
    In a CUDA graph capture `apply`, after a first `update`, and call `advance` before each replay.

    Args:
        model: a module, on its device, compiled or under DistributedDataParallel or not; or the engine of
            `deepspeed.initialize`, stages 0 to 3. Weights that want no gradient when this is made stay what they are.
        decay: from 0 to 1, or its schedule: `warmed_up`, `cosine`, or any function of the number of updates.
        buffers: "copy" takes them as they are (BatchNorm's statistics are averages already), "average" averages
            those in floating point, each rank its own, but for what an average would spoil: spectral norm's vectors,
            quantisation's ranges and scales, pruning's masks, values that are not finite (attention's masks), and
            what a module names in a tuple `copied_buffers`. Those that are not persistent are the model's own caches,
            and left alone.
        teacher: a copy of the model, of any floating point dtype, frozen, whose weights and buffers are the averages
            from now on, rounded to its dtypes: MoCo's and DINO's (arXiv:1911.05722, arXiv:2104.14294). Under ZeRO
            stages 0 to 2.

    Attributes:
        averages: float32 (float64 of float64), by the parameter's name; under ZeRO this rank's parts, flat.
        buffer_averages: by the buffer's name.
        num_updates: so far.

    Raises:
        ValueError: a decay out of range, weights that ZeRO-3 cut up without their engine, a teacher unlike the model.
    """

    def __init__(
        self,
        model: Any,
        decay: float | Schedule = 0.9999,
        *,
        buffers: Literal["copy", "average"] = "copy",
        teacher: nn.Module | None = None,
    ) -> None:
        op = "EMA"
        if not callable(decay):
            check_decay(op, "decay", decay)
        require(op, buffers in ("copy", "average"), "buffers must be 'copy' or 'average', got {!r}", buffers)
        self._is_collective = is_engine(model)
        self._weights = weights_of(model)
        self.model = self._weights.module
        self.decay = decay
        self.buffers = buffers
        self.num_updates = 0
        flats, held = self._weights.flats, kept_buffers(self.model)
        self._averaged = averaged_buffers(self.model) if buffers == "average" else []
        # of the weights, as they are laid out, then of buffers
        self._targets = [_widened(x) for x in (*flats, *(held[name] for name in self._averaged))]
        self._copies = {name: x.detach().clone() for name, x in held.items() if name not in self._averaged}
        self._decay = torch.zeros((), dtype=torch.float64, device=flats[0].device if flats else "cpu")
        self._is_swapped = False
        self._shadows: list[Tensor] | None = None
        self._teacher: _Teacher | None = None
        if teacher is not None:
            self._teach(unwrapped(teacher))
        self.averages = self._weights.parts(self._of_weights())
        means = dict(zip(self._averaged, self._targets[len(flats) :], strict=True))
        self.buffer_averages: dict[str, Tensor] = {name: (self._copies | means)[name] for name in held}
        self._collect()

    def update(self) -> None:
        """Averages the model's weights of now; call it after each optimizer step. A ValueError within `swapped`, and of
        a model that was moved, or whose weights have other names or shapes than before, or that trains weights which
        were frozen."""
        self.advance()
        self.apply()

    def advance(self) -> None:
        """The host's half of `update`: sees that the model is what it was, and sets the decay that `apply` reads."""
        require("EMA", not self._is_swapped, "update must be outside of {}, got {}", "swapped()", "a call within")
        if self._weights.refresh():
            self._collect()
        if self._teacher is not None:
            self._teacher.check()
        decay = self.decay(self.num_updates) if callable(self.decay) else self.decay
        check_decay("EMA", f"decay of update {self.num_updates}", decay)
        self._decay.fill_(decay)
        self.num_updates += 1

    @torch.no_grad()
    def apply(self) -> None:
        """The device's half of `update`, which a CUDA graph may capture: it reads the decay from the device."""
        ema_update_(self._targets, self._sources, self._decay, shadows=self._shadows)
        for name, x in self._copied.items():
            self._copies[name].copy_(x)
        if self._teacher is not None:
            self._teacher.finish(self._copies)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the model's weights and buffers, in place and in their dtypes, for as long as the block
        lasts; what was there comes back however it ends."""
        held = kept_buffers(self.model)
        before = {name: x.clone() for name, x in held.items()}
        with self._weights.shown(self._of_weights()):
            _copy(self.buffer_averages, held)
            self._is_swapped = True
            try:
                yield
            finally:
                self._is_swapped = False
                _copy(before, held)

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole average of each weight; under ZeRO at most 2 GiB of them at a time."""
        return self._weights.whole(self._of_weights())

    def copy_to(self, model: nn.Module) -> None:
        """Writes the averages into a model of the same names and shapes; a ValueError names what it lacks."""
        model = unwrapped(model)
        into = dict(model.named_parameters()) | kept_buffers(model)
        _check_shapes({name: shape for name, (_, shape) in self._layout().items()}, into)
        for name, x in self._everything():
            into[name].detach().copy_(x)

    def save(self, path: Path | str) -> None:
        """Writes averages, buffers and the number of updates as a safetensors file, by full names, atomically: of an
        engine rank 0, its own buffers. The file does not depend on the number of ranks or the stage. An OSError or
        ValueError (a dtype that safetensors lacks) is raised on every rank."""
        tensors, error = self._everything(), None
        if not self._is_collective or dist.get_rank() == 0:
            try:
                write_tensors(Path(path), self._layout(), tensors, {_COUNT: str(self.num_updates)})
            except (OSError, ValueError) as caught:
                error = caught
        for _ in tensors:
            pass  # what is gathered and not written here
        if self._is_collective:
            errors = [error]
            dist.broadcast_object_list(errors)
            error = errors[0]
        if error is not None:
            raise error

    def load(self, path: Path | str) -> None:
        """Goes on from a file of `save`, at any number of ranks, of any stage, or of a plain module; a ValueError of
        another file, or names or shapes other than this model's."""
        layout, (found, metadata) = self._layout(), read_layout(Path(path))
        require("EMA.load", _COUNT in metadata, "path must be a file of EMA.save, got {}", path)
        caches = dict(self.model.named_buffers()).keys() - layout.keys()  # older files have them
        differ = sorted((found.keys() - caches) ^ layout.keys())[:3]
        require("EMA.load", not differ, "{} must be of this model, got a difference in {}", path, differ)
        for name, (_, shape) in layout.items():
            got = found[name][1]
            require("EMA.load", got == shape, "{} must be {}, got {}", name, list(shape), list(got))
        for name, x in read_tensors(Path(path)):
            if name in self.buffer_averages:
                self.buffer_averages[name].copy_(x)
            elif name not in caches:
                self._weights.scatter({name: x}, self._of_weights())
        self.num_updates = int(metadata[_COUNT])
        self._show()

    def state_dict(self) -> dict[str, Any]:
        """The averages by name, and the number of updates; a ValueError under ZeRO-1 to 3, where they are one rank's:
        use `save`."""
        self._check_whole("state_dict", "save")
        return {"num_updates": self.num_updates, "averages": dict(self.averages), "buffers": dict(self.buffer_averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, on whatever device it lies; a ValueError of names or shapes other than this
        model's, and under ZeRO-1 to 3, where `load` does it."""
        self._check_whole("load_state_dict", "load")
        for kind, held in (("averages", self.averages), ("buffers", self.buffer_averages)):
            caches = dict(self.model.named_buffers()).keys() - held.keys()  # older states have them
            given = {name: x for name, x in state[kind].items() if name not in caches}
            differ = sorted(held.keys() ^ given.keys())
            require("EMA.load_state_dict", not differ, "state must have this model's {}, got {}", kind, differ[:3])
            _copy(given, held)
        self.num_updates = state["num_updates"]
        self._show()

    def _teach(self, module: nn.Module) -> None:
        """Has `module` follow; where its dtypes are the averages', its weights are the averages themselves."""
        self._teacher = _Teacher(module, self._weights, self._averaged)
        shadows = self._teacher.shadows
        if all(x.dtype == y.dtype for x, y in zip(shadows, self._targets, strict=True)):
            overwrite(shadows, self._targets)
            self._targets = shadows
        else:
            self._shadows = shadows
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        """Writes what the averages are into the teacher."""
        if self._teacher is not None:
            if self._shadows is not None:
                overwrite(self._shadows, self._targets)
            self._teacher.finish(self._copies)

    def _collect(self) -> None:
        """What an update reads of the model."""
        held = kept_buffers(self.model)
        self._sources = [*self._weights.flats, *(held[name] for name in self._averaged)]
        self._copied = {name: held[name] for name in self._copies}

    def _of_weights(self) -> list[Tensor]:
        return self._targets[: len(self._weights.flats)]

    def _everything(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.gathered()
        yield from self.buffer_averages.items()

    def _layout(self) -> Layout:
        buffers = {name: (x.dtype, x.shape) for name, x in self.buffer_averages.items()}
        return self._weights.layout(self._of_weights()) | buffers

    def _check_whole(self, method: str, instead: str) -> None:
        whole = isinstance(self._weights, Whole)
        require(f"EMA.{method}", whole, "model must hold its weights, got parts of ZeRO: use EMA.{}", instead)


class _Teacher:
    """A frozen copy of a model, written by the pass that averages the model's weights and the `averaged` buffers:
    `shadows` are its weights laid out like `weights.flats`, then those buffers."""

    def __init__(self, module: nn.Module, weights: Whole | Shards, averaged: Sequence[str]) -> None:
        self._module, self._buffers = module, kept_buffers(module)
        shapes = {name: x.shape for name, x in self._buffers.items()}
        same = shapes == {name: x.shape for name, x in kept_buffers(weights.module).items()}
        require("EMA", same, "teacher must have the model's buffers, got {}", sorted(shapes))
        shadows, self._finish = weights.follow(module)
        self.shadows = [*shadows, *(self._buffers[name] for name in averaged)]
        theirs = dict(module.named_parameters())
        with torch.no_grad():
            for name, p in weights.module.named_parameters():
                if name not in weights.params:
                    theirs[name].copy_(p)
        module.requires_grad_(False)
        self._places = _places(module)

    def check(self) -> None:
        same = _places(self._module) == self._places
        require("EMA", same, "teacher must stay as it was given, got {}", "weights moved, cast or replaced")

    def finish(self, copies: Mapping[str, Tensor]) -> None:
        """Behind an update: the buffers that are no averages, and under ZeRO the other ranks' weights."""
        for name, x in copies.items():
            self._buffers[name].copy_(x)
        self._finish()


def _places(module: nn.Module) -> list[object]:
    return [(x.data_ptr(), x.dtype) for x in tensors_of(module)]


def _widened(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    _check_shapes({name: x.shape for name, x in tensors.items()}, into)
    for name, x in tensors.items():
        into[name].copy_(x)


def _check_shapes(shapes: Mapping[str, torch.Size], into: Mapping[str, Tensor]) -> None:
    for name, shape in shapes.items():
        require("EMA", name in into, "model must have {}, got {}", name, "none")
        same = into[name].shape == shape
        require("EMA", same, "{} must be {}, got {}", name, list(shape), list(into[name].shape))
