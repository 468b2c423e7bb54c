"""A model of transformers made to run on our operations as a whole, in somebody else's loop, and undone."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from mmcore.integrations.attention_interface import NAME, register
from mmcore.labels import IGNORED
from mmcore.nn import Linear
from mmcore.ops import CALLS_ONEDNN, linear_cross_entropy, require

OP = "accelerate"
_STATE = "_mmcore_accelerated"


class LazyLogits(Tensor):
    """Logits `[..., V]` of a head that nobody has computed: whoever reads a value of them has the head's own output,
    with its graph; a loss that knows them takes the states instead."""

    head: nn.Module
    states: Tensor
    is_wide: bool
    value: Tensor | None

    @staticmethod
    def __new__(cls, head: Any, states: Tensor, is_wide: bool = False) -> "LazyLogits":
        dtype = torch.float32 if is_wide else states.dtype
        shape = (*states.shape[:-1], head.out_features)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=states.device)
        made.head, made.states, made.is_wide, made.value = head, states, is_wide, None
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def made(self) -> Tensor:
        """The logits, computed once."""
        value = self.value
        if value is None:
            value = self.head(self.states, now=True)
            self.value = value = value.float() if self.is_wide else value
        return value

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.float and isinstance(args[0], LazyLogits):  # what autocast's wrappers do to all outputs
            return LazyLogits(args[0].head, args[0].states, True)

        def read(x: Any) -> Any:
            if isinstance(x, LazyLogits):
                return x.made()
            if isinstance(x, (list, tuple)) and any(isinstance(y, LazyLogits) for y in x):
                return type(x)(map(read, x))
            return x

        return func(*map(read, args), **{name: read(x) for name, x in (kwargs or {}).items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"LazyLogits: {func} reached a tensor without values")


_OF_SHAPE = frozenset(
    [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, Tensor.__len__]
    + [
        vars(torch._C.TensorBase)[name].__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "grad_fn")
    ]
    + [vars(torch._C.TensorBase)["is_leaf"].__get__, vars(torch._C.TensorBase)["is_meta"].__get__]
)


def _head_forward(head: Any, x: Tensor, labels: Tensor | None = None, *, now: bool = False) -> Any:
    """A head's forward: logits that nobody has computed, in training; with `labels` the sum of their cross-entropies,
    in here since ZeRO-3 has the weights whole inside of a module's forward."""
    if labels is not None:
        states = x.flatten(0, -2)
        return linear_cross_entropy(states, head.weight, labels.flatten(), bias=head.bias, reduction="sum")
    if now or not (head.training and torch.is_grad_enabled()) or is_compiling():
        return type(head).forward(head, x)
    return LazyLogits(head, x)


def _loss(
    theirs: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss`, without the logits where nobody has computed them."""
    is_plain = isinstance(logits, LazyLogits) and logits.value is None and ignore_index == IGNORED
    if not is_plain or logits.shape[-1] != vocab_size:
        more = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, "shift_labels": shift_labels}
        return theirs(logits=logits, labels=labels, vocab_size=vocab_size, **more, **options)
    assert isinstance(logits, LazyLogits)
    wanted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shift_labels is None else shift_labels
    wanted = wanted.to(logits.states.device)
    total = logits.head(logits.states, wanted.contiguous())
    if num_items_in_batch is None:
        return total / (wanted != IGNORED).sum()
    count = num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
    return total / count


@dataclass(frozen=True)
class Accelerated:
    """What `accelerate` did; printed, a line for each."""

    changed: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*(f"changed: {x}" for x in self.changed), *(f"left: {x}" for x in self.left)])


@dataclass
class _Before:
    """What a model was, for `restore`."""

    attention: list[tuple[Any, Any]] = field(default_factory=list)  # configurations, and what they had
    layers: list[tuple[nn.Module, type, Any]] = field(default_factory=list)  # modules, classes, forwards of their own
    losses: list[tuple[Any, Any]] = field(default_factory=list)


def accelerate(model: nn.Module, *, attention: bool = True, head: bool = True, layers: bool = True) -> Accelerated:
    """Makes a model of transformers run on our operations, in place; `restore` undoes it. Weights, names and
    `state_dict` stay, so that Trainer, accelerate, peft and DeepSpeed take it as before.

    ```
    print(accelerate(model))
    Trainer(model, ...).train()
    ```

    Call it on the model before it is wrapped; a PeftModel is looked into.

    Args:
        model: of transformers, or one with such models in it.
        attention: `attn_implementation="mmkernels"`, see `register`: the results of "eager".
        head: in training the loss comes from the states before the output layer by `mmkernels.linear_cross_entropy`,
            and no logits are stored; `outputs.logits` are computed where somebody reads them.
        layers: `mmcore.nn.Linear` for each torch.nn.Linear, where that is faster on this machine's CPU; on a GPU
            Liger's norms and MLPs where Liger is installed and knows the model.

    Returns:
        What was changed and what was left, and why.

    Raises:
        ValueError: a model without one of transformers in it, and one that is accelerated already.
    """
    models = [x for x in model.modules() if isinstance(x, PreTrainedModel)]
    require(OP, bool(models), "model must be of transformers, got {}", type(model).__name__)
    require(OP, not hasattr(models[0], _STATE), "model must not be accelerated already, got {}", type(model).__name__)
    before = _Before(layers=[(x, type(x), vars(x).get("forward")) for x in model.modules()])
    changed: list[str] = []
    left: list[str] = []
    if attention:
        _set_attention(models, before, changed, left)
    if layers:
        _set_layers(models[0], changed, left)
    if head:
        _set_head(models, before, changed, left)
    object.__setattr__(models[0], _STATE, before)
    return Accelerated(tuple(changed), tuple(left))


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`; a ValueError of a model that it did not change."""
    models = [x for x in model.modules() if isinstance(x, PreTrainedModel) and hasattr(x, _STATE)]
    require("restore", bool(models), "model must be accelerated, got {}", type(model).__name__)
    before: _Before = getattr(models[0], _STATE)
    for config, name in before.attention:
        config._attn_implementation_internal = name
    for module, kind, forward in before.layers:
        if type(module) is not kind:
            module.__class__ = kind
        if forward is None:
            vars(module).pop("forward", None)
        else:
            module.forward = forward
    for owner, loss in before.losses:
        if loss is None:
            del owner._loss_function
        else:
            owner._loss_function = loss
    object.__delattr__(models[0], _STATE)


def _set_attention(models: list[Any], before: _Before, changed: list[str], left: list[str]) -> None:
    register()
    inner = [getattr(x.config, name, None) for x in models for name in x.config.sub_configs]
    configs = {id(c): c for c in [*(x.config for x in models), *inner] if c is not None}
    before.attention += [(config, config._attn_implementation_internal) for config in configs.values()]
    able = [x for x in models if x._can_set_attn_implementation()]
    for x in able:
        x.config._attn_implementation_internal = NAME
    if able:
        names = dict.fromkeys(type(x).__name__ for x in able)
        changed.append(f"attention of {', '.join(names)}: mmkernels.attention")
    own = dict.fromkeys(type(x).__name__ for x in models if x not in able)
    left += [f"attention of {name}, which computes its own" for name in own]


def _set_layers(model: Any, changed: list[str], left: list[str]) -> None:
    device = next(model.parameters()).device.type
    if device == "cuda":
        if importlib.util.find_spec("liger_kernel") is None:
            left.append("norms and MLPs: Liger is not installed")
            return
        liger: Any = importlib.import_module("liger_kernel.transformers")
        names = ("cross_entropy", "fused_linear_cross_entropy")
        kind = model.config.model_type
        if kind not in importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN:
            left.append(f"norms and MLPs: Liger does not know {kind}")
            return
        liger._apply_liger_kernel_to_instance(model=model, rope=False, **dict.fromkeys(names, False))
        changed.append("norms and MLPs: Liger's")
        return
    plain = [x for x in model.modules() if type(x) is nn.Linear]
    if not CALLS_ONEDNN:
        left.append("linear layers: torch's products are the fastest here")
        return
    for layer in plain:
        layer.__class__ = Linear
    changed.append(f"{len(plain)} linear layers: oneDNN's products of float32")


def _set_head(models: list[Any], before: _Before, changed: list[str], left: list[str]) -> None:
    for owner in models:
        kind, find = type(owner).__name__, getattr(owner, "get_output_embeddings", None)
        layer = find() if find is not None else None
        if layer is None or not any(layer is x for x in owner.children()):  # an inner model's
            continue
        if type(layer) not in (nn.Linear, Linear) or "forward" in vars(layer):
            left.append(f"head of {kind}, which is a {type(layer).__name__}")
        elif owner.loss_function is not ForCausalLMLoss:
            left.append(f"head of {kind}, whose loss is its own")
        else:
            before.losses.append((owner, vars(owner).get("_loss_function")))
            layer.forward = MethodType(_head_forward, layer)
            owner.loss_function = partial(_loss, owner.loss_function)
            changed.append(f"head of {kind}: mmkernels.linear_cross_entropy, without logits in training")
