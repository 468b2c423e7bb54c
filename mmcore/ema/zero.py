"""Where ZeRO keeps a model's weights: each rank's fp32 parts, by full names. DeepSpeed itself is not imported."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcore.ema.watch import Watch, check_teacher, overwrite
from mmcore.ops import require
from mmcore.tensor_file import Layout

# Of float32 that is gathered at a time: neither device nor host holds a whole model.
PIECE_BYTES = 2 << 30

# Tensors laid out like `Shards.flats`, all of them or some by their number.
Flats = Sequence[Tensor] | Mapping[int, Tensor]


class _Place(NamedTuple):
    """A rank's part of a parameter."""

    group: int  # which of the flat tensors
    offset: int  # where in it
    start: int  # where in the parameter
    numel: int  # 0 = the rank has none


# What keeps a teacher's weights: tensors laid out like what they are copies of, and what comes after, collective.
Follower = tuple[list[Tensor], Callable[[], None]]


class Shards:
    """This rank's fp32 parts of the trainable weights of a DeepSpeed engine (of `deepspeed.initialize`), ZeRO stages 0
    to 3; `module` is the engine's, without wrappers.

    Methods take tensors laid out like `flats` (weights, moments, averages) and what they return is by parameter.
    Those said to be collective are called on every rank with the same names.

    Attributes:
        params: the trainable parameters, by name.
        flats: what the client optimizer is handed: a flat fp32 tensor a parameter group, in stage 3 a sub-group;
            in stage 0 the parameters themselves.
        members: names of the parameters that each of `flats` holds parts of, on this rank or another.
    """

    def __init__(self, engine: Any, module: nn.Module) -> None:
        self.stage: int = engine.zero_optimization_stage()
        self.module = module
        self.device: torch.device = engine.device
        self.params: dict[str, Any] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._zero: Any = engine.optimizer
        self.flats: list[Tensor] = self._flats()
        self._places = {name: self._place(name) for name in self.params}
        self.members: list[list[str]] = [[] for _ in self.flats]
        for name, place in self._places.items():
            self.members[place.group].append(name)
        self._stamp, self._watch = _stamp(self.flats), Watch(module)

    def refresh(self) -> bool:
        """Sees that the engine holds what it held; whether a buffer or parameter was put in another's place. A
        ValueError names another model, or other flat tensors."""
        same = _stamp(self._flats()) == self._stamp
        require("EMA", same, "engine must keep its fp32 weights where they were, got {}", "others")
        return self._watch.has_replaced()

    def _flats(self) -> list[Tensor]:
        if self.stage == 0:
            return list(self.params.values())
        if self.stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        # the second is of bf16 weights with gradients accumulated in fp32, under stage 1
        groups = getattr(self._zero, "single_partition_of_fp32_groups", None)
        return list(self._zero.fp32_groups_flat_partition if groups is None else groups)

    def _place(self, name: str) -> _Place:
        p = self.params[name]
        if self.stage == 0:
            return _Place(list(self.params).index(name), 0, 0, p.numel())
        missing = "a trainable weight that is not"
        if self.stage == 3:
            known = hasattr(p, "_z3_optimizer")
            require("Shards", known, "{} must be in the optimizer, got {}", name, missing)
            group, offset, numel = self._zero.grad_position[self._zero.get_param_id(p)]
            start = dist.get_rank(self._zero.dp_process_group) * p.ds_tensor.ds_numel
            numel = min(numel, p.ds_numel - start)  # the last ranks' partitions are padded
            held = self.flats[group].numel() >= offset + max(numel, 0)
            require("Shards", held, "{} must be in memory, got weights offloaded to {}", name, "NVMe")
            return _Place(group, offset, start, max(numel, 0))
        # not by p._hp_mapping, which DeepSpeed 0.19.8 gets wrong under round_robin_gradients
        groups = enumerate(self._flat_weights())
        found = [(i, _offset(p, flat)) for i, flat in groups if _is_within(p, flat)]
        require("Shards", bool(found) or not p.numel(), "{} must be in the optimizer, got {}", name, missing)
        for group, offset in found:
            first = dist.get_rank(self._zero.real_dp_process_group[group]) * self.flats[group].numel()
            start, end = max(offset, first), min(offset + p.numel(), first + self.flats[group].numel())
            if start < end:
                return _Place(group, start - first, start - offset, end - start)
        return _Place(found[0][0] if found else 0, 0, 0, 0)

    def fragment(self, name: str, of: Flats) -> tuple[Tensor, int] | None:
        """This rank's part of a parameter in `of`, flat, and the number of its first element; None = it has none."""
        place = self._places[name]
        if place.numel == 0:
            return None
        return of[place.group].detach().view(-1).narrow(0, place.offset, place.numel), place.start

    def numel(self, name: str) -> int:
        """Number of elements of a whole parameter (under ZeRO-3 the tensor itself is empty)."""
        return self.shape(name).numel()

    def shape(self, name: str) -> torch.Size:
        p = self.params[name]
        return p.ds_shape if self.stage == 3 else p.shape

    def pieces(self, names: Iterable[str] | None = None) -> list[list[str]]:
        """Names (None = all), in order, in lists of at most `PIECE_BYTES` of fp32 (or one parameter)."""
        pieces: list[list[str]] = [[]]
        size = 0
        for name in self.params if names is None else names:
            size += 4 * self.numel(name)
            if pieces[-1] and size > PIECE_BYTES:
                pieces.append([])
                size = 4 * self.numel(name)
            pieces[-1].append(name)
        return pieces

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place. Collective."""
        if self.stage > 0:
            dist.all_reduce(x, group=self._zero.dp_process_group)
        return x

    def gather(self, names: Sequence[str], of: Flats) -> dict[str, Tensor]:
        """Whole fp32 tensors on every rank. Collective: one all-reduce."""
        sizes = [self.numel(name) for name in names]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=self.device)
        whole = {name: part.view(self.shape(name)) for name, part in zip(names, flat.split(sizes), strict=True)}
        for name, x in whole.items():
            fragment = self.fragment(name, of)
            if fragment is not None:
                source, start = fragment
                x.view(-1).narrow(0, start, source.numel()).copy_(source)
        self.total(flat)
        return whole

    def scatter(self, tensors: Mapping[str, Tensor], into: Flats) -> None:
        """Writes whole tensors into this rank's parts; no communication."""
        for name, value in tensors.items():
            fragment = self.fragment(name, into)
            if fragment is not None:
                target, start = fragment
                target.copy_(value.reshape(-1).narrow(0, start, target.numel()))

    def parts(self, of: Sequence[Tensor]) -> dict[str, Tensor]:
        """This rank's part of each parameter that it has one of, flat."""
        fragments = {name: self.fragment(name, of) for name in self.params}
        return {name: fragment[0] for name, fragment in fragments.items() if fragment is not None}

    def layout(self, of: Sequence[Tensor]) -> Layout:
        """Dtype and shape by name, in the order of `whole`."""
        return {name: (torch.float32, self.shape(name)) for name in self.params}

    def whole(self, of: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of each parameter, in order. Collective: gathered piece by piece."""
        for names in self.pieces():
            yield from self.gather(names, of).items()

    @contextmanager
    def shown(self, of: Sequence[Tensor]) -> Iterator[None]:
        """`of` in the module's weights, in their dtypes, for as long as the block lasts. Collective."""
        held = [p.ds_tensor for p in self.params.values()] if self.stage == 3 else self._flat_weights()
        before = [x.clone() for x in held]
        try:
            with self._partitioned():
                if self.stage == 3:
                    for name, part in self.parts(of).items():
                        self.params[name].ds_tensor.narrow(0, 0, part.numel()).copy_(part)
                else:
                    for flat, x, group in zip(held, of, self._zero.real_dp_process_group, strict=True):
                        _segment(flat, group).copy_(x)
                        _all_gather(flat, group)
            yield
        finally:
            with self._partitioned():
                overwrite(held, before)

    @contextmanager
    def _partitioned(self) -> Iterator[None]:
        """In stage 3 no parameter is whole inside the block, and those that persist are gathered anew behind it, as
        around DeepSpeed's own steps."""
        if self.stage < 3:
            yield
            return
        self._zero.parameter_offload.partition_all_parameters()
        yield
        self._zero.invalidate_secondary_tensor()
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def _flat_weights(self) -> list[Tensor]:
        """What the module computes with in stages 1 and 2: a flat tensor a group, of which the parameters are views."""
        groups = getattr(self._zero, "bit16_groups_flat", None)
        return [flat.detach() for flat in (self._zero.bf16_groups_flat if groups is None else groups)]

    def follow(self, teacher: nn.Module) -> Follower:
        """Makes the teacher's parameters views of flat tensors in its dtypes, laid out as ZeRO lays out the module's: a
        rank writes its segment, and `finish` gathers the others'. A ValueError in stage 3, or of a teacher unlike the
        module."""
        instead = "3, whose weights are never whole: use stage 1 or 2, or average without a teacher"
        require("EMA", self.stage < 3, "teacher must be under ZeRO stage 0, 1 or 2, got {}", instead)
        theirs = check_teacher(teacher, self.module, self.flats[0].device)
        flats, groups = [], self._zero.real_dp_process_group
        for flat in self._flat_weights():
            offsets = {name: _offset(p, flat) for name, p in self.params.items() if _is_within(p, flat)}
            dtypes = {theirs[name].dtype for name in offsets}
            require("EMA", len(dtypes) == 1, "teacher must have one dtype a parameter group, got {}", dtypes)
            flats.append(torch.zeros_like(flat, dtype=dtypes.pop()))
            for name, offset in offsets.items():
                p = theirs[name]
                p.data = flats[-1].narrow(0, offset, p.numel()).view(p.shape)

        def finish() -> None:
            for flat, group in zip(flats, groups, strict=True):
                _all_gather(flat, group)

        return [_segment(flat, group) for flat, group in zip(flats, groups, strict=True)], finish


def _stamp(flats: Sequence[Tensor]) -> list[object]:
    return [(id(x), x.shape, x.device) for x in flats]


def _is_within(p: Tensor, flat: Tensor) -> bool:
    begin = flat.data_ptr()
    return begin <= p.data_ptr() < begin + flat.numel() * flat.element_size()


def _offset(p: Tensor, flat: Tensor) -> int:
    return (p.data_ptr() - flat.data_ptr()) // p.itemsize


def _segment(flat: Tensor, group: Any) -> Tensor:
    """This rank's part of a flat tensor that is cut evenly."""
    size = flat.numel() // dist.get_world_size(group)
    return flat.narrow(0, dist.get_rank(group) * size, size)


def _all_gather(flat: Tensor, group: Any) -> None:
    dist.all_gather_into_tensor(flat, _segment(flat, group), group=group)
