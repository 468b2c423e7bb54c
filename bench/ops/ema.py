"""`mmkernels.ema_update_`: its entries in the contract test, and the parameters of published models beside foreach and
the loops of others.

The roofline is a copy of as many bytes: in float32 12 a parameter, and as many from bfloat16 parameters into float32
averages with bfloat16 copies.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.case import Case
from bench.harness import CPU, DEVICE, ON_GPU, Bench, Claims
from bench.lists import Tensors, joined, list_spec, normal_of, shape_words, sizes, tensors, update_case
from bench.measure import paired_medians
from bench.peers import load
from bench.spec import Inputs, OpSpec, Shape
from mmkernels import ema_update_, ema_update_ref_


def _ema_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """near: a source a hundredth from its average; far: another tensor."""
    normal = normal_of(shape, seed)
    targets, noise = normal(), normal()
    sources = [t + 0.01 * n if case == "near" else n for t, n in zip(targets, noise, strict=True)]
    return {
        "targets": tuple(x.to(dtype) for x in targets),
        "sources": tuple(x.to(dtype) for x in sources),
        "decay": 0.9,
    }


def _averaged(fn: Callable[..., None], targets: Tensors, sources: Tensors, decay: float, *, shadowed: bool) -> Any:
    """New averages, and their copies, each as one tensor."""
    targets = tuple(x.clone() for x in targets)
    shadows = [torch.empty_like(x) for x in targets] if shadowed else None
    fn(targets, sources, decay, shadows=shadows)
    return (joined(targets),) if shadows is None else (joined(targets), joined(tuple(shadows)))


def _spec(variant: str, *, shadowed: bool) -> OpSpec:
    op, ref = (partial(_averaged, fn, shadowed=shadowed) for fn in (ema_update_, ema_update_ref_))
    return list_spec(f"ema_update_{variant}", op, ref, _ema_inputs, ("near", "far"))


EMA, SHADOWED = _spec("", shadowed=False), _spec("[shadows]", shadowed=True)
SPECS = (EMA, SHADOWED)

DECAY, BYTES = 0.999, 12
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]
Update = Callable[[list[Tensor], list[Tensor], list[Tensor]], None]


def lists(name: str, kind: str, device: torch.device) -> Lists:
    """Averages, parameters and copies; "fp32" has none of these and float32 all through, "bf16" has bfloat16
    parameters and copies."""
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    targets, sources = tensors(name, torch.float32, device), tensors(name, dtype, device)
    return targets, sources, [] if kind == "fp32" else [torch.empty_like(x) for x in sources]


def ours(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> None:
    ema_update_(targets, sources, DECAY, shadows=shadows or None)


def timm(sources: list[Tensor]) -> Callable[[], None]:
    """ModelEmaV3 of a module of the parameters, whose average it makes itself, by foreach."""
    model = nn.ParameterList(nn.Parameter(x, requires_grad=False) for x in sources)
    average = load("timm").ModelEmaV3(model, decay=DECAY)
    return lambda: average.update(model)


def foreach(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> None:
    """timm's ModelEmaV3 and torch's `get_ema_multi_avg_fn`; mixed dtypes are cast first, since they refuse them."""
    torch._foreach_lerp_(targets, [x.float() for x in sources] if shadows else sources, 1 - DECAY)
    if shadows:
        torch._foreach_copy_(shadows, targets)


def loop(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> None:
    """MoCo's and most others': one tensor after the other, `target * m + source * (1 - m)`."""
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        target.copy_(target * DECAY + source * (1 - DECAY))
        if shadows:
            shadows[i].copy_(target)


CONTENDERS: Mapping[str, Update] = {"mmkernels": ours, "foreach_lerp": foreach, "loop": loop}
MODELS = ("many", "few", "ViT-B-16", "ViT-L-14") if ON_GPU else ("many", "few", "ViT-B-32")


def _case(name: str, kind: str, contender: str) -> Case:
    if contender == "timm" and kind != "fp32":
        pytest.skip("timm keeps no copies in another dtype")
    made = lists(name, kind, DEVICE)
    call = timm(made[1]) if contender == "timm" else partial(CONTENDERS[contender], *made)
    return update_case(f"ema_update_ {kind} {shape_words(name)}", contender, call, BYTES * sum(sizes(name)))


AXES = {"name": MODELS, "kind": ("fp32", "bf16"), "contender": (*CONTENDERS, "timm")}
BENCHES = (Bench("ema_update_", _case, AXES, ("timm",)),)


def _is_level_with_foreach(kind: str, least: float) -> None:
    """And moves its 12 bytes a parameter at 85 % of a copy's rate, or more."""
    made, (source, target) = lists("ViT-B-32", kind, CPU), torch.randn(2, sum(sizes("ViT-B-32"))).unbind()
    runs = {who: partial(CONTENDERS[who], *made) for who in ("mmkernels", "foreach_lerp")}
    medians = paired_medians(runs | {"copy": lambda: target.copy_(source)}, 15, CPU)
    ratio = medians["foreach_lerp"] / medians["mmkernels"]
    share = BYTES / 8 * medians["copy"] / medians["mmkernels"]
    print(f"ViT-B-32 {kind}: {medians}: {ratio:.2f}x, {100 * share:.0f} % of a copy's rate")
    assert ratio >= least and share >= 0.85


def _is_five_times_as_fast_as_the_loop_on_small_tensors() -> None:
    made = lists("many", "fp32", CPU)
    medians = paired_medians({who: partial(CONTENDERS[who], *made) for who in ("mmkernels", "loop")}, 15, CPU)
    ratio = medians["loop"] / medians["mmkernels"]
    print(f"10,000 small tensors: {medians}: {ratio:.2f}x")
    assert ratio >= 5


CLAIMS: Claims = {
    "of a CLIP, level with foreach": partial(_is_level_with_foreach, "fp32", 0.95),
    "of a CLIP in mixed dtypes, ahead of foreach": partial(_is_level_with_foreach, "bf16", 1.5),
    "of many small tensors, five times as fast as the loop": _is_five_times_as_fast_as_the_loop_on_small_tensors,
}
