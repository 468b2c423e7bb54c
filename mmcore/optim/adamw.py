"""AdamW that averages the weights it makes, in the same pass over memory."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from mmcore.ema import Schedule
from mmcore.ops import adamw_update_
from mmcore.optim.base import EMAOptimizer, Group


class AdamWEMA(EMAOptimizer):
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
        clip_each: largest norm of each parameter's own gradient (DINO clips so); None = any.

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
        clip_each: float | None = None,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings, ema, clamp, clip_each)

    def _moments(self, group: Group) -> list[str]:
        return ["exp_avg", "exp_avg_sq"]

    def _update(self, group: Group, params: list[Tensor], weights: list[Tensor], step: int) -> None:
        average = {}
        if group["ema"] is not None:
            average = {"averages": self._states(params, "ema"), "decay": group["ema"]}
        grads = [p.grad for p in params if p.grad is not None]
        moments = self._states(params, "exp_avg"), self._states(params, "exp_avg_sq")
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "clamp")}
        copies = None if weights is params else params
        adamw_update_(weights, grads, *moments, step=step, copies=copies, **settings, **average)
