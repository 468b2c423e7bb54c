"""Backwards that have no derivative of their own."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


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
                raise RuntimeError(
                    f"{op}: create_graph must be False, its gradient has no derivative of its own, got True; take "
                    f"{instead} for second derivatives"
                )
            return backward(ctx, *grads)

        return checked

    return decorated
