"""What a backward of our own can and cannot be asked for: anything else is an error, never a term that is missing."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels._checks import require

functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def first_order(op: str, instead: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a backward that is not differentiable an error under create_graph=True: torch's once_differentiable lets it
    pass where the upstream gradient is a constant, and the second derivative would be missing in silence.

    Args:
        op: whose backward.
        instead: what has second derivatives.
    """

    def decorated(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(_no_second_derivative(op, instead))
            return backward(ctx, *grads)

        return checked

    return decorated


def has_no_derivative(op: str, instead: str) -> Callable[..., Any]:
    """The backward to register for the op that computes the gradient of `op`, where that gradient has none."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_no_second_derivative(op, instead))

    return backward


def _no_second_derivative(op: str, instead: str) -> str:
    return (
        f"{op}: create_graph must be False, its gradient has no derivative of its own, got True; take {instead} for "
        "second derivatives"
    )


def reverse_only(op: str, instead: str, **tensors: Tensor | None) -> None:
    """Refuses what torch.func's grad and jvp, or forward-mode AD, differentiate by: of a registered op torch leaves the
    tangent out in silence. A compiled graph is refused under any of these.

    Args:
        op: who refuses.
        instead: what has these derivatives.
        tensors: by the name of the argument.
    """
    if not _is_differentiating():
        return
    for name, x in tensors.items():
        require(
            op,
            x is None or not (torch.compiler.is_compiling() or _is_tracked(x)),
            "{} must not be differentiated by torch.func or in forward mode, got one that is; take {} there",
            name,
            instead,
        )


def untransformed(op: str, instead: str, lists: Mapping[str, Sequence[Tensor] | None]) -> None:
    """Refuses tensors under any transform, vmap too: of lists that are read by address, or of what goes to ranks."""
    if not is_transforming():
        return
    for name, tensors in lists.items():
        is_transformed = torch.compiler.is_compiling() or any(_is_transformed(x) for x in tensors or ())
        sentence = "{} must not be transformed by torch.func or be dual tensors, got what is; take {} there"
        require(op, not is_transformed, sentence, name, instead)


def is_transforming() -> bool:
    """Whether a transform of torch.func, vmap too, or forward-mode AD is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_differentiating() -> bool:
    levels = functorch.get_interpreter_stack() or ()
    of_func = any(level.key() in (functorch.TransformType.Grad, functorch.TransformType.Jvp) for level in levels)
    return of_func or forward_ad._current_level >= 0


for is_constant in (is_transforming, _is_differentiating):
    # all that torch.compiler.assume_constant_result does, after importing Dynamo, which takes as long as torch
    is_constant._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _is_tracked(x: Tensor) -> bool:
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _is_transformed(x: Tensor) -> bool:
    return functorch.is_functorch_wrapped_tensor(x) or _is_tracked(x)
