"""What `mmkernels.ema_update_` is measured on and against: lists of parameters, averaged as others do it."""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from bench.peers import load
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmkernels import ema_update_

DECAY = 0.999
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]
Update = Callable[[list[Tensor], list[Tensor], list[Tensor]], None]


@cache
def sizes(name: str) -> tuple[int, ...]:
    """Elements of each tensor: of a CLIP, of 10,000 tensors of up to 4,096, or of few large ones."""
    if name == "many":
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randint(1, 4097, (10_000,), generator=generator).tolist())
    if name == "few":
        return (2**24,) * 4
    with torch.device("meta"):
        model = CLIP(CLIP_CONFIGS[name])
    return tuple(p.numel() for p in model.parameters())


def tensors(name: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Of a list's sizes, each a repeated draw: to draw all would take longer than to time them."""
    longest = max(sizes(name))
    drawn = torch.randn(min(longest, 1 << 20), device=device, dtype=dtype)
    drawn = drawn.repeat(-(-longest // len(drawn)))
    return [drawn[:n].clone() for n in sizes(name)]


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
