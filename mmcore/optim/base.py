"""What the optimizers share."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mmcore.ema import Schedule
from mmcore.ema.watch import overwrite
from mmcore.ema.zero import Shards
from mmcore.ops import ema_update_, require

Group = dict[str, Any]


class EMAOptimizer(Optimizer):
    """What these optimizers share: the average, float32 masters, clamping, clipping, groups that are frozen.

    What looks at whole parameters (LARS, Muon, `clip_each`) has to be told what ZeRO's flat partitions hold: `bind`. A
    group is left as it is while its `frozen` is set; `mmcore.train.engine.Engine` sets it for the first `frozen_until`
    steps.

    Args:
        settings: the optimizer's own, for groups that do not say otherwise.
        params, ema, clamp, clip_each: as in `AdamWEMA`.
    """

    _shards: Shards | None = None
    _groups: Sequence[int] = ()

    def __init__(
        self,
        params: Iterable[Any],
        settings: dict[str, Any],
        ema: float | Schedule | None,
        clamp: tuple[float, float] | None,
        clip_each: float | None,
    ) -> None:
        self.schedule: Schedule | None = ema if callable(ema) else None
        decay = self.schedule(0) if self.schedule else ema
        shared = {"ema": decay, "clamp": clamp, "clip_each": clip_each, "frozen": False, "frozen_until": 0}
        super().__init__(params, settings | shared)
        for group in self.param_groups:
            self._check(group)

    def bind(self, shards: Shards, groups: Sequence[int]) -> None:
        """Tells what the flat tensors are made of that DeepSpeed hands in instead of parameters: those of its engine's
        `shards`, each of the parameter group of its number in `groups`."""
        self._shards, self._groups = (shards if shards.stage > 0 else None), groups

    @property
    def state_keys(self) -> list[str]:
        """Names of the states that have an element for each of a float32 parameter's."""
        averaged = any(group["ema"] is not None for group in self.param_groups)
        moments = [key for group in self.param_groups for key in self._moments(group)]
        return [*dict.fromkeys(moments), *(["ema"] if averaged else [])]

    def init_state(self, p: Tensor, step: int = 0) -> None:
        """Zero moments and an average equal to the weights, as they are after `step` steps."""
        if self._shards is None:
            group = next(g for g in self.param_groups if any(p is q for q in g["params"]))
        else:
            group = self.param_groups[self._groups[self._index(p)]]
        self._init(group, p, step)

    @torch.no_grad()
    def _init(self, group: Group, p: Tensor, step: int) -> None:
        state, wide = self.state[p], torch.promote_types(p.dtype, torch.float32)
        state["step"] = torch.tensor(float(max(0, step - group["frozen_until"])))
        for key in self._moments(group):
            state[key] = torch.zeros_like(p, dtype=wide)
        if wide != p.dtype:
            state["master"] = p.detach().to(wide)
        if "ema" in self.state_keys:
            state["ema"] = p.detach().to(wide, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Steps and averages all parameters that have a gradient; returns what `closure` does. A ValueError of a sparse
        gradient, a RuntimeError in the capture of a CUDA graph, which would repeat one step's learning rate for
        ever."""
        loss, name = None, type(self).__name__
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{name}.step cannot be captured in a CUDA graph; mmkernels.adamw_update_ can")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and not group["frozen"]]
            for p in params:
                require(name, not p.grad.is_sparse, "gradients must be dense, got {}", "a sparse one")
                if not self.state[p]:
                    self._init(group, p, 0)
            counts = [self.state[p]["step"] for p in params]
            if counts:
                torch._foreach_add_(counts, 1)
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for p, count in zip(params, counts, strict=True):
                alike[int(count), p.device, "master" in self.state[p]].append(p)
            for (count, _, has_master), part in alike.items():
                self._clip(group["clip_each"], part)
                if group["ema"] is not None and self.schedule is not None:
                    group["ema"] = self.schedule(count - 1)
                self._update(group, part, self._states(part, "master") if has_master else part, count)
        return loss

    def _moments(self, group: Group) -> list[str]:
        raise NotImplementedError

    def _update(self, group: Group, params: list[Tensor], weights: list[Tensor], step: int) -> None:
        """Their `step`-th, of parameters of one device; `weights` are their masters, or they themselves."""
        raise NotImplementedError

    def _finish(self, group: Group, params: list[Tensor], weights: list[Tensor]) -> None:
        """Behind an update: clamps, averages, copies."""
        if group["clamp"] is not None:
            for w in weights:
                w.clamp_(*group["clamp"])
        if group["ema"] is not None:
            ema_update_(self._states(params, "ema"), weights, group["ema"])
        if weights is not params:
            torch._foreach_copy_(params, weights)

    def _states(self, params: list[Tensor], key: str) -> list[Tensor]:
        return [self.state[p][key] for p in params]

    def _clip(self, most: float | None, params: list[Tensor]) -> None:
        """Brings the gradient of each parameter to norm `most` where it is longer."""
        if most is None:
            return
        parts = [part for p in params if p.grad is not None for part in self._parts(p, p.grad)]
        factors = (most / (self._norms(parts) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(parts, list(factors.unbind()))

    def _index(self, p: Tensor) -> int:
        flats = () if self._shards is None else self._shards.flats
        return next(i for i, flat in enumerate(flats) if flat is p)

    def _shapes(self, p: Tensor) -> list[torch.Size]:
        """Of the whole parameter that `p` is, or of those that it holds a rank's parts of."""
        shards = self._shards
        return [p.shape] if shards is None else [shards.shape(n) for n in shards.members[self._index(p)]]

    def _parts(self, p: Tensor, x: Tensor) -> list[Tensor]:
        """`x`, laid out like `p`, parameter by parameter as in `_shapes`: this rank's part, which may be empty."""
        if self._shards is None:
            return [x]
        i, shards = self._index(p), self._shards
        fragments = [shards.fragment(name, {i: x}) for name in shards.members[i]]
        return [x.new_empty(0) if fragment is None else fragment[0] for fragment in fragments]

    def _norms(self, parts: list[Tensor]) -> Tensor:
        """Norms of whole parameters, [num_parts], of the parts that this rank has; under ZeRO collective."""
        wide = functools.reduce(torch.promote_types, {x.dtype for x in parts}, torch.float32)
        norms = torch.stack(torch._foreach_norm(parts, dtype=wide))
        if self._shards is None:
            return norms
        squares = norms.square().to(self._shards.device)  # partitions may be offloaded to the host
        return self._shards.total(squares).sqrt().to(norms.device)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the parameters, in place, for as long as the block lasts; what was there comes back
        however it ends. Of parameters alone: of ZeRO's partitions a model sees nothing."""
        averaged = {p.detach(): state["ema"] for p, state in self.state.items() if "ema" in state}
        before = [x.clone() for x in averaged]
        try:
            overwrite(averaged, averaged.values())
            yield
        finally:
            overwrite(averaged, before)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, of torch's AdamW and SGD too: its average starts from the weights as they are.
        What is kept in float32 stays so, which torch would cast to the parameter's dtype."""
        super().load_state_dict(dict(state_dict))
        params = [(group, p) for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (group, p) in zip(numbers, params, strict=True):
            saved = state_dict["state"].get(number)
            if saved is not None:
                self._init(group, p, 0)
                for key, value in self.state[p].items():
                    value.copy_(torch.as_tensor(saved.get(key, value)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def _check(self, group: Group) -> None:
        op, lr, decay, each = type(self).__name__, float(group["lr"]), group["ema"], group["clip_each"]
        require(op, 0 <= lr < math.inf, "lr must be at least 0, got {}", lr)
        is_decay = decay is None or 0 <= decay <= 1
        require(op, is_decay, "ema must be from 0 to 1, a schedule or None, got {}", decay)
        require(op, each is None or each > 0, "clip_each must be above 0 or None, got {}", each)
        if "momentum" in group:  # `adamw_update_` checks its own
            momentum, weight_decay, clamp = group["momentum"], group["weight_decay"], group["clamp"]
            require(op, 0 <= momentum < 1, "momentum must be from 0 to less than 1, got {}", momentum)
            require(op, weight_decay >= 0, "weight_decay must be at least 0, got {}", weight_decay)
            is_range = clamp is None or clamp[0] <= clamp[1]
            require(op, is_range, "clamp must be (low, high), got {}", clamp)


def grads_of(params: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """In the dtypes of the weights."""
    return [p.grad.to(w.dtype) for p, w in zip(params, weights, strict=True) if p.grad is not None]
