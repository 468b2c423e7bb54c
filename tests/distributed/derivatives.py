"""What the losses over ranks and BatchNorm do where another derivative than backward()'s is asked for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcore.losses import global_contrastive_loss, global_sigmoid_loss, global_token_contrastive_loss
from mmcore.nn import BatchNorm
from tests.distributed import cases
from tests.kernels.derivatives import MODES

LOSSES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "`global_contrastive_loss`": ("a", lambda a, b: global_contrastive_loss(a, b, cases.SCALE)),
    "`global_sigmoid_loss`": ("a", lambda a, b: global_sigmoid_loss(a, b, cases.SCALE, cases.BIAS)),
    "`global_token_contrastive_loss` over ranks": (
        "tokens", lambda tokens, b: global_token_contrastive_loss(tokens, b, cases.SCALE)
    ),
}  # fmt: skip


def normalized_whole(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True).pow(3).sum()


def cells() -> dict[str, dict[str, Any]]:
    """Of each function, by column, this rank's value, or the sentence that refuses it."""
    batch, rank = cases.batch(), dist.get_rank()
    rows = cases.extent(cases.LAYOUTS[dist.get_world_size()]["uneven"], rank)
    found = {}
    for name, (first, loss) in LOSSES.items():
        found[name] = row(lambda x, loss=loss: loss(x, batch["b"][rows]), batch[first][rows])
    layer = BatchNorm(cases.DIM)
    return found | {"`mmcore.nn.BatchNorm` over ranks": row(lambda x: layer(x).pow(3).sum(), batch["a"][rows].float())}


def row(f: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Any]:
    def compiled() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(torch.compile(f, backend="aot_eager")(leaf), leaf)[0]

    calls = {mode: (lambda call=call: call(f, x, torch.ones_like(x))) for mode, call in MODES.items()}
    leaf = x.clone().requires_grad_()
    plain = torch.autograd.grad(f(leaf), leaf)[0]
    return {mode: said(call) for mode, call in (calls | {"`torch.compile`": compiled}).items()} | {
        "plain": plain.tolist()
    }


def said(call: Callable[[], Tensor]) -> Any:
    try:
        return call().tolist()
    except (ValueError, RuntimeError) as error:
        return str(error)
