"""What the tests of `mmcore.nn` share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.nn import CrossAttention


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True)


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> tuple[int, Any]:
    """What autograd saves in a forward, weights aside, and the forward's result."""
    weights = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = forward()
    return sum(x.untyped_storage().nbytes() for x in saved.values()), result


def torchs(ours: CrossAttention) -> nn.MultiheadAttention:
    """torch's module with the weights of ours."""
    width, key_width = ours.q.in_features, ours.kv.in_features
    theirs = nn.MultiheadAttention(width, ours.num_heads, kdim=key_width, vdim=key_width, batch_first=True)
    weights = {
        "q_proj_weight": ours.q.weight, "k_proj_weight": ours.kv.weight[:width],
        "v_proj_weight": ours.kv.weight[width:], "in_proj_bias": torch.cat([ours.q.bias, ours.kv.bias]),
        "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias,
    }  # fmt: skip
    theirs.to(ours.q.weight.dtype).load_state_dict(weights)
    return theirs


def copy_rows(linear: nn.Linear, *others: nn.Linear) -> None:
    """`linear` gets the rows of the others, one behind the other."""
    with torch.no_grad():
        linear.weight.copy_(torch.cat([other.weight for other in others]))
        if linear.bias is not None:
            linear.bias.copy_(torch.cat([other.bias for other in others]))


def copy_norm(norm: nn.Module, other: nn.Module) -> None:
    """`norm` gets the weights of the other, which are drawn."""
    for weights in other.parameters():
        nn.init.uniform_(weights, 0.5, 1.5)
    norm.load_state_dict(other.state_dict())
