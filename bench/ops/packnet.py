"""`mmkernels.apply_masks_`: its entry in the contract test, and the parameters of models beside foreach."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.harness import Claims
from bench.lists import Call, Contenders, Tensors, assert_not_slower, bench_of, joined, list_spec, normal, normal_of
from bench.spec import Inputs, Shape
from mmkernels import apply_masks_, apply_masks_ref_


def _mask_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """bool; owners: the second and the third of five tasks."""
    normal = normal_of(shape, seed)
    tensors = tuple(x.to(dtype) for x in normal())
    masks = [x > 0 if case == "bool" else (2 + x).clamp(0, 5).to(torch.uint8) for x in normal()]
    return {"tensors": tensors, "masks": tuple(masks), "owners": None if case == "bool" else (2, 3)}


def _masked(fn: Callable[..., None], tensors: Tensors, masks: Tensors, owners: tuple[int, int] | None) -> Any:
    tensors = tuple(x.clone() for x in tensors)
    fn(tensors, masks, owners=owners)
    return joined(tensors)


MASKS = list_spec(
    "apply_masks_", partial(_masked, apply_masks_), partial(_masked, apply_masks_ref_), _mask_inputs, ("bool", "owners")
)
SPECS = (MASKS,)


def our_masks(name: str, device: torch.device) -> Call:
    weights, masks = normal(name, device), [x > 0 for x in normal(name, device)]
    return Call(lambda: apply_masks_(weights, masks))


def foreach_masks(dtype: torch.dtype) -> Callable[[str, torch.device], Call]:
    def make(name: str, device: torch.device) -> Call:
        weights, masks = normal(name, device), [(x > 0).to(dtype) for x in normal(name, device)]
        return Call(lambda: torch._foreach_mul_(weights, masks))

    return make


CONTENDERS: Contenders = {
    "mmkernels": our_masks,
    "foreach_mul bool": foreach_masks(torch.bool),
    "foreach_mul float32": foreach_masks(torch.float32),
}
BENCHES = (bench_of("apply_masks_", 9, CONTENDERS),)
CLAIMS: Claims = {"not slower than foreach": partial(assert_not_slower, "apply_masks_", CONTENDERS)}
