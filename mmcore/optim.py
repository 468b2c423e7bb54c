"""AdamW that averages the weights it makes, in the same pass over memory."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mmcore.ema import Schedule
from mmcore.ops import adamw_update_, require


class AdamWEMA(Optimizer):
    """torch.optim.AdamW and an exponential moving average of the weights, in one launch a parameter group.

    ```
    optimizer = AdamWEMA(model.parameters(), lr=1e-3, ema=0.9999)
    ...
    optimizer.step()
    with optimizer.swapped():
        evaluate(model)
    ```

    It works on whatever tensors it is handed: parameters, or, as the client optimizer of DeepSpeed, the flat
    partitions that ZeRO 1, 2 and 3 make of a group. The average lives in `state[p]["ema"]`, so that it is sharded
    exactly like the moments. Moments and averages are float32 (float64 of float64). Parameters in half precision
    are stepped in float32 too, in `state[p]["master"]`, and are copies of it.

    Args:
        params: parameters, or groups of them, as of any optimizer; each of these settings may differ by group.
        lr: learning rate.
        betas: decays of the moments, each from 0 to less than 1.
        eps: at least 0.
        weight_decay: decoupled, at least 0.
        ema: decay of the average, from 0 to 1; a schedule of the number of updates before (`mmcore.ema.warmed_up`,
            `mmcore.ema.cosine`), which sets `group["ema"]` at each step; None = no average.
        clamp: (low, high) that the weights are brought between after each step; None = none.

    Papers: arXiv:1711.05101 (AdamW), arXiv:1703.01780 (the average).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ema: float | Schedule | None = 0.9999,
        clamp: tuple[float, float] | None = None,
    ) -> None:
        self.schedule: Schedule | None = ema if callable(ema) else None
        decay = self.schedule(0) if self.schedule else ema
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | {"ema": decay, "clamp": clamp})
        for group in self.param_groups:
            _check(group)

    @property
    def state_keys(self) -> list[str]:
        """Names of the states that have an element for each of a float32 parameter's."""
        averaged = any(group["ema"] is not None for group in self.param_groups)
        return ["exp_avg", "exp_avg_sq", *(["ema"] if averaged else [])]

    @torch.no_grad()
    def init_state(self, p: Tensor, step: int = 0) -> None:
        """Zero moments and an average equal to the weights, as they are after `step` steps."""
        state, wide = self.state[p], torch.promote_types(p.dtype, torch.float32)
        state["step"] = torch.tensor(float(step))
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=wide) for _ in range(2))
        if wide != p.dtype:
            state["master"] = p.detach().to(wide)
        if "ema" in self.state_keys:
            state["ema"] = p.detach().to(wide, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Steps and averages all parameters that have a gradient; returns what `closure` does.

        Raises:
            ValueError: a sparse gradient; a setting out of its range.
            RuntimeError: in the capture of a CUDA graph, which would repeat one step's learning rate for ever.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "AdamWEMA.step cannot be captured in a CUDA graph; mmkernels.adamw_update_ can"
            )
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                require("AdamWEMA", not p.grad.is_sparse, "gradients must be dense, got {}", "a sparse one")
                if not self.state[p]:
                    self.init_state(p)
            counts = [self.state[p]["step"] for p in params]
            if counts:
                torch._foreach_add_(counts, 1)
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for p, count in zip(params, counts, strict=True):
                alike[int(count), p.device, "master" in self.state[p]].append(p)
            for (count, _, has_master), part in alike.items():
                self._update(group, part, count, has_master)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], step: int, has_master: bool) -> None:
        """Their `step`-th, of parameters of one device that all have a master, or none."""
        if group["ema"] is not None and self.schedule is not None:
            group["ema"] = self.schedule(step - 1)
        states = [self.state[p] for p in params]
        average = (
            {} if group["ema"] is None else {"averages": [s["ema"] for s in states], "decay": group["ema"]}
        )
        adamw_update_(
            [state["master"] for state in states] if has_master else params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            lr=group["lr"],
            step=step,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            clamp=group["clamp"],
            copies=params if has_master else None,
            **average,
        )

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the parameters, in place, for as long as the block lasts; what was there comes back
        however it ends. Of parameters alone: of ZeRO's partitions a model sees nothing."""
        averaged = {p: state["ema"] for p, state in self.state.items() if "ema" in state}
        before = {p: p.detach().clone() for p in averaged}
        try:
            _fill(averaged)
            yield
        finally:
            _fill(before)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, of torch.optim.AdamW too: its average starts from the weights as they are.

        What is kept in float32 stays so, which torch would cast to the parameter's dtype.
        """
        super().load_state_dict(dict(state_dict))
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            saved = state_dict["state"].get(number)
            if saved is not None:
                self.init_state(p)
                for key, value in self.state[p].items():
                    value.copy_(torch.as_tensor(saved.get(key, value)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key in ("ema", "clamp"):
                group.setdefault(key, self.defaults[key])


@torch.no_grad()
def _fill(values: Mapping[Tensor, Tensor]) -> None:
    for p, value in values.items():
        p.copy_(value)


def _check(group: Mapping[str, Any]) -> None:
    op = "AdamWEMA"
    lr, decay = float(group["lr"]), group["ema"]
    require(op, 0 <= lr < math.inf, "lr must be at least 0, got {}", lr)
    is_decay = decay is None or 0 <= decay <= 1
    require(op, is_decay, "ema must be from 0 to 1, a schedule or None, got {}", decay)
