"""Every variant of the distributed losses on these ranks: values, gradients, refusals and the memory they take."""

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.integrations.contrastive import use_global_loss
from mmcore.losses import global_contrastive_loss, global_sigmoid_loss, global_token_contrastive_loss
from mmkernels._device import runs_triton
from tests.distributed import cases, derivatives, drop_in, tiny
from tests.distributed.launch import serve
from tests.kernels.recorded import Operations
from tests.mmcore.integrations import dual_encoders

DUAL_ENCODERS = ("CLIP", "SigLIP")


def run(
    loss: Callable[..., Tensor],
    first: str,
    scales: tuple[float, ...],
    counts: tuple[int, ...],
    case: cases.Case,
    limit: int,
    dtype: torch.dtype = torch.float64,
    second: str = "b",
) -> dict[str, Any]:
    """Three times a loss of this rank's rows of the batch, and the gradients of all its features and scales."""
    batch, rank = cases.batch(dtype), dist.get_rank()
    rows = cases.extent(counts, rank)
    cols = cases.extent(counts[::-1], rank) if "labels" in case.tensors else rows
    leaves = [batch[first][rows].clone(), batch[second][cols].clone()]
    leaves += [torch.full((1,), value, dtype=dtype) for value in scales]
    for x in leaves:
        x.requires_grad_()
    value = 3 * loss(*leaves, **case.arguments(batch, rows, cols), gather_limit_bytes=limit)
    value.backward()
    grads = [x.grad.double().tolist() for x in leaves if x.grad is not None]
    return {"loss": value.item(), "dtype": str(value.dtype), "grads": grads}


contrastive = partial(run, global_contrastive_loss, "a", (cases.SCALE,))
sigmoid = partial(run, global_sigmoid_loss, "a", (cases.SCALE, cases.BIAS))
token = partial(run, global_token_contrastive_loss, "tokens", (cases.SCALE,))
late = partial(token, second="texts")


def ragged(limit: int) -> dict[str, Any]:
    """Late interaction where the first rank pads its texts to fewer tokens."""
    batch, rank = cases.batch(), dist.get_rank()
    rows = cases.extent(cases.LAYOUTS[dist.get_world_size()]["even"], rank)
    tokens, longest = batch["tokens"][rows].clone().requires_grad_(), 2 if rank == 0 else 3
    texts, mask = batch["texts"][rows, :longest], batch["b mask"][rows, :longest]
    loss = global_token_contrastive_loss(tokens, texts, cases.SCALE, b_mask=mask, gather_limit_bytes=limit)
    (grad,) = torch.autograd.grad(loss, tokens)
    unmasked = message(lambda: global_token_contrastive_loss(tokens, texts, 1.0, gather_limit_bytes=limit))
    return {"loss": loss.item(), "grad": grad.tolist(), "unmasked": unmasked}


def variants(
    one: Callable[..., Any],
    named: dict[str, cases.Case],
    names: Iterable[str] = (),
    layouts: Iterable[str] = (),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Of all names and layouts, if none are given."""
    counts = cases.LAYOUTS[dist.get_world_size()]
    return {
        f"{name}; {layout}; {exchange}": one(counts[layout], named[name], limit, dtype)
        for name in names or named
        for layout in layouts or counts
        for exchange, limit in cases.EXCHANGES.items()
    }


def dual_encoder(name: str) -> dict[str, Any]:
    """Loss and data-parallel mean of the gradients of a model of transformers after `use_global_loss`."""
    model = dual_encoders.make(name)
    use_global_loss(model)
    batch = {key: mine(x) for key, x in dual_encoders.batch(12).items()}
    loss = model(**batch, return_loss=True).loss
    loss.backward()
    gradients = {}
    for parameter, p in model.named_parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            gradients[parameter] = (p.grad / dist.get_world_size()).tolist()
    return {"loss": loss.item(), "gradients": gradients}


def mine(x: Tensor) -> Tensor:
    return tiny.share(x, dist.get_rank(), dist.get_world_size())


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def refusals() -> dict[str, str]:
    """What this rank is told where one rank, the last, differs from the others."""
    batch, odd = cases.batch(), dist.get_rank() == dist.get_world_size() - 1
    a, b, labels = batch["a"][:2], batch["b"][:2], batch["row labels"][:2]
    narrow, queue = slice(0, cases.DIM - odd), batch["negatives"][: 4 + odd]
    calls: dict[str, Callable[[], object]] = {
        "D": lambda: loss(a[:, narrow], b[:, narrow]),
        "dtype": lambda: loss(a.float(), b.float()) if odd else loss(a, b),
        "labels": lambda: loss(a, b, labels=None if odd else (labels, labels)),
        "exclude": lambda: loss(a, b, exclude=None if odd else 1 - torch.arange(2)),
        "negatives": lambda: loss(a, b, negatives=queue),
        "teacher": lambda: loss(a, b, teacher=(a, b), alpha=0.5) if odd else loss(a, b),
        "symmetric": lambda: loss(a, b, symmetric=odd),
        "label_smoothing": lambda: loss(a, b, label_smoothing=0.1 + odd / 10),
        "gather_limit_bytes": lambda: loss(a, b, gather_limit_bytes=5 + odd),
        "requires_grad": lambda: loss(a.clone().requires_grad_(odd), b),
        "loss": lambda: global_sigmoid_loss(a, b, 5.0, 0.0) if odd else loss(a, b),
        "a rank's own b": lambda: loss(a, b[:1] if odd else b),
        "a rank's own exclude": lambda: loss(a, b, exclude=torch.arange(2) if odd else 1 - torch.arange(2)),
        "a rank's own labels": lambda: loss(a, b, labels=(labels, labels.int() if odd else labels)),
        "a rank's own claim": lambda: loss(a * (1 + odd), b, normalized=True),
        "a rank's own scale": lambda: global_contrastive_loss(a, b, float("nan") if odd else 5.0),
    }

    def loss(a: Tensor, b: Tensor, **arguments: Any) -> Tensor:
        return global_contrastive_loss(a, b, 5.0, **arguments)

    return {name: message(call) for name, call in calls.items()}


def largest_tensors() -> dict[str, int]:
    sizes = {}
    for exchange, limit in cases.EXCHANGES.items():
        features = torch.ones(2, 4096, requires_grad=True)
        with Operations() as seen:
            global_contrastive_loss(features, features, 1.0, gather_limit_bytes=limit).backward()
            global_sigmoid_loss(features, features, 1.0, 0.0, gather_limit_bytes=limit).backward()
            global_token_contrastive_loss(features[:, None], features, 1.0, gather_limit_bytes=limit).backward()
        sizes[exchange] = seen.largest
    return sizes


def apart(limit: int, dtype: torch.dtype = torch.float64) -> float:
    """The ranks' features point in opposite ways: no logit of another rank survives the shift."""
    x = cases.apart()[cases.extent(cases.LAYOUTS[dist.get_world_size()]["even"], dist.get_rank())].to(dtype)
    return global_contrastive_loss(x, x, 100.0, normalized=True, gather_limit_bytes=limit).item()


def special() -> dict[str, Any]:
    """Inputs that single out one property each."""
    rank, counts = dist.get_rank(), cases.LAYOUTS[dist.get_world_size()]["even"]
    rows, results = cases.extent(counts, rank), {}
    batch = cases.batch()
    a, b = batch["a"][rows], batch["b"][rows]
    for exchange, limit in cases.EXCHANGES.items():

        def loss(a: Tensor, b: Tensor, scale: float | Tensor, limit: int = limit, **arguments: Any) -> Tensor:
            return global_contrastive_loss(a, b, scale, gather_limit_bytes=limit, **arguments)

        broken = a.clone()
        broken[0] = torch.nan if rank == 0 else broken[0]
        results[f"nan, {exchange}"] = loss(broken, b, 5.0).isnan().item()
        results[f"apart, {exchange}"] = apart(limit)
        for dtype in (torch.float32, torch.float64):
            near = cases.near(dtype)[rows]
            results[f"small {dtype}, {exchange}"] = loss(near, near, 1.0).item()
        frozen = b.clone().requires_grad_()
        loss(a, frozen, 5.0, symmetric=False).backward()
        results[f"frozen, {exchange}"] = frozen.grad.tolist()  # pyright: ignore[reportOptionalMemberAccess]
        with torch.no_grad():
            results[f"no_grad, {exchange}"] = loss(a, b, torch.tensor(5.0, requires_grad=True)).item()
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = loss(a.float(), b.float(), 5.0).item()
        results[f"autocast, {exchange}"] = under_autocast - loss(a.bfloat16(), b.bfloat16(), 5.0).item()
    return results


def by_kernels() -> dict[str, Any]:
    """On the Triton kernels, which an interpreter runs: float32, uneven ranks."""
    assert runs_triton(torch.empty(1))
    import_module("tests.kernels.interpreter").patch_language_once()
    few: dict[str, Any] = {"layouts": ["uneven"], "dtype": torch.float32}
    return {
        "variants": variants(contrastive, cases.CASES, ["everything", "normalized"], **few),
        "sigmoid": variants(sigmoid, cases.SIGMOID_CASES, ["plain"], **few),
        "token": variants(token, cases.TOKEN_CASES, ["masked, smoothed"], **few),
        "apart": {exchange: apart(limit, torch.float32) for exchange, limit in cases.EXCHANGES.items()},
    }


def main(folder: Path, kernels: bool = False) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if kernels:
        return by_kernels()
    return {
        "variants": variants(contrastive, cases.CASES),
        "float32": variants(contrastive, cases.CASES, ["plain", "everything"], ["one empty"], torch.float32),
        "sigmoid": variants(sigmoid, cases.SIGMOID_CASES), "token": variants(token, cases.TOKEN_CASES),
        "late": variants(late, cases.LATE_CASES), "ragged": {x: ragged(y) for x, y in cases.EXCHANGES.items()},
        "drop-in": drop_in.compared(), "misplaced": message(drop_in.misplaced), "refusals": refusals(),
        "dual encoders": {name: dual_encoder(name) for name in DUAL_ENCODERS}, "largest": largest_tensors(),
        "special": special(), "derivatives": derivatives.cells() if dist.get_world_size() == 2 else {},
    }  # fmt: skip


if __name__ == "__main__":
    serve(main)
