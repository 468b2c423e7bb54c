"""The losses over the global batch on W ranks against one process with the whole batch."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import contrastive_loss_ref, sigmoid_loss_ref, token_contrastive_loss_ref
from tests.distributed import cases, derivatives, worker_losses
from tests.distributed.launch import run_ranks
from tests.kernels.derivatives import MODES, REFUSED, table
from tests.mmcore.integrations import dual_encoders

WHOLE = slice(0, cases.NUM)


@pytest.fixture(scope="module", params=[2, 3, 4])
def results(request, tmp_path_factory):
    return run_ranks("worker_losses", request.param, tmp_path_factory.mktemp("losses"))


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def on_one_process(
    loss: Callable[..., Tensor],
    case: cases.Case,
    batch: dict[str, Tensor],
    first: str = "a",
    scales: tuple[float, ...] = (cases.SCALE,),
    second: str = "b",
) -> list[Tensor]:
    """Three times the reference's loss of the whole batch, and its gradients of all features and scales."""
    leaves = [batch[first].clone(), batch[second].clone()]
    leaves += [torch.full((1,), value, dtype=leaves[0].dtype) for value in scales]
    for x in leaves:
        x.requires_grad_()
    arguments = case.arguments(batch, WHOLE, WHOLE)
    if "mask" in arguments or "b_mask" in arguments:
        arguments["masks"] = arguments.pop("mask", None), arguments.pop("b_mask", None)
    value = 3 * loss(*leaves, **arguments)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def together(results: list[dict], key: str, name: str) -> list[Tensor]:
    """One process's loss and gradients as the ranks give them: the mean of their gradients."""
    of_ranks = [result[key][name] for result in results]
    assert len({found["loss"] for found in of_ranks}) == 1, "the ranks differ in the loss"
    loss = tensor(of_ranks[0]["loss"])
    grads = zip(*(found["grads"] for found in of_ranks), strict=True)
    da, db, *scales = ([tensor(g) for g in grad] for grad in grads)
    da, db = (torch.cat([g for g in grad if len(g)]) / len(results) for grad in (da, db))
    return [loss, da, db, *(torch.stack(ds).mean(0).reshape(1) for ds in scales)]


# by the key of their results: the cases, the reference, the first features and the scales
LOSSES = {
    "variants": (cases.CASES, contrastive_loss_ref, "a", (cases.SCALE,)),
    "sigmoid": (cases.SIGMOID_CASES, sigmoid_loss_ref, "a", (cases.SCALE, cases.BIAS)),
    "token": (cases.TOKEN_CASES, token_contrastive_loss_ref, "tokens", (cases.SCALE,)),
    "late": (cases.LATE_CASES, token_contrastive_loss_ref, "tokens", (cases.SCALE,), "texts"),
}


@functools.cache
def truth_of(key: str, case: str) -> list[Tensor]:
    named, reference, *leaves = LOSSES[key]
    return on_one_process(reference, named[case], cases.batch(), *leaves)


@pytest.mark.parametrize("key", LOSSES)
def test_every_variant_has_the_loss_and_the_gradients_of_one_process(results, key):
    for run in results[0][key]:
        truth = truth_of(key, run.split("; ")[0])
        for found, expected in zip(together(results, key, run), truth, strict=True):
            assert found.shape == expected.shape
            assert expected.abs().max() > 1e-3, f"{run}: the check needs a gradient that is not zero"
            assert (found - expected).abs().max() < 1e-10 * expected.abs().max(), run


def check_float32(results, key, named, loss, first, scales):
    for run in results[0][key]:
        case = named[run.split("; ")[0]]
        batch = cases.batch(torch.float32)
        widened = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
        gold = on_one_process(loss, case, widened, first, scales)
        reference = on_one_process(loss, case, batch, first, scales)
        assert results[0][key][run]["dtype"] == "torch.float32"
        for found, ref, exact in zip(together(results, key, run), reference, gold, strict=True):
            bound = 2 * (ref - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
            assert (found - exact).abs().max() <= bound, run


def test_float32_is_within_the_contract_of_the_reference(results):
    check_float32(results, "float32", *LOSSES["variants"])


@pytest.fixture(scope="module")
def by_triton(tmp_path_factory):
    return run_ranks("worker_losses", 2, tmp_path_factory.mktemp("triton"), interpret=True, kernels=True)


@pytest.mark.parametrize("key", ["variants", "sigmoid", "token"])
def test_the_kernels_are_within_the_contract_of_the_reference(by_triton, key):
    check_float32(by_triton, key, *LOSSES[key])


@pytest.mark.parametrize("exchange", cases.EXCHANGES)
def test_blocks_of_which_no_logit_survives_the_shift_add_nothing(by_triton, exchange):
    x = cases.apart()
    expected = contrastive_loss_ref(x, x, 100.0).item()
    for result in by_triton:
        assert abs(result["apart"][exchange] - expected) < 1e-5 * expected


SAME = ["D", "dtype", "labels", "exclude", "negatives", "teacher", "symmetric", "label_smoothing", "gather_limit_bytes"]


@pytest.mark.parametrize("name", [*SAME, "requires_grad"])
def test_ranks_that_differ_get_one_error_on_every_rank(results, name):
    messages = {result["refusals"][name] for result in results}
    assert len(messages) == 1
    (text,) = messages
    assert text.startswith(f"global_contrastive_loss: {name} must be the same on every rank, got ")
    assert " on rank 0, " in text and text.endswith(f" on rank {len(results) - 1}")


def test_ranks_in_different_losses_get_an_error_each(results):
    differ = "loss must be the same on every rank, got global_contrastive_loss on rank 0, global_sigmoid_loss on"
    for result in results:
        assert f": {differ} rank {len(results) - 1}" in result["refusals"]["loss"]


@pytest.mark.parametrize(("name", "complaint"), [
    ("b", "contrastive: b must have the shape of a, [2, 6], got [1, 6]"),
    ("exclude", "contrastive: exclude must not be the row's positive, got column 0 for row 0"),
    ("labels", "contrastive: labels[1] must be int64 [2], got torch.int32 [2]"),
    ("claim", "contrastive: a must have rows of unit norm, as normalized=True claims"),
    ("scale", "contrastive: logit_scale must be finite, got nan"),
])  # fmt: skip
def test_a_mistake_of_one_rank_is_an_error_on_all(results, name, complaint):
    *others, odd = (result["refusals"][f"a rank's own {name}"] for result in results)
    assert odd.startswith(complaint)
    for text in others:
        prefix = f"global_contrastive_loss: rank {len(results) - 1} refused its arguments: "
        assert text.startswith(prefix + complaint)


def test_the_ring_never_holds_the_gathered_features(results):
    gathered, two_shards = len(results) * 2 * 4096, 2 * 2 * 4096
    for result in results:
        assert result["largest"]["gathered"] >= gathered and result["largest"]["ring"] < two_shards


def test_the_drop_in_classes_are_their_published_formulas(results):
    """On each rank, its own gradients; the value is the mean of the ranks' there."""
    for name in results[0]["drop-in"]:
        published = [result["drop-in"][name]["published"] for result in results]
        mean = sum(of_rank["loss"] for of_rank in published) / len(results)
        for result, expected in zip(results, published, strict=True):
            ours = result["drop-in"][name]["ours"]
            assert abs(ours["loss"] - mean) < 1e-10, name
            for found, grad in zip(ours["grads"], expected["grads"], strict=True):
                assert (tensor(found) - tensor(grad)).abs().max() < 1e-10, name


def test_a_place_that_the_process_group_contradicts_is_refused_on_every_rank(results):
    right, *wrong = (result["misplaced"] for result in results)
    for rank, text in enumerate(wrong, start=1):
        place = (rank, len(results))
        assert text == (
            f"ClipLoss: rank and world_size must be those of the process group, {place}, got {(0, len(results))}"
        )
    assert right.startswith("ClipLoss: rank 1 refused its arguments: ClipLoss: rank and world_size must be")


@pytest.mark.parametrize("exchange", cases.EXCHANGES)
def test_nan_far_blocks_large_logits_no_grad_and_autocast_are_as_on_one_process(results, exchange):
    def special(name: str) -> list[Any]:
        return [result["special"][f"{name}, {exchange}"] for result in results]

    batch, x = cases.batch(), cases.apart()
    far = contrastive_loss_ref(x, x, 100.0).item()  # no logit of another block is in reach
    small = math.log1p((cases.NUM - 1) * math.exp(-11))  # log-sum-exps near 100 are rounded by 32 epsilon
    plain = contrastive_loss_ref(batch["a"], batch["b"], 5.0).item()
    table = [("apart", far, 1e-10 * far), ("no_grad", plain, 1e-10)]
    table += [(f"small {dtype}", small, 4 * torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float64)]
    for name, expected, bound in table:
        assert all(abs(found - expected) < bound for found in special(name)), name
    assert all(special("nan")) and not any(special("autocast"))
    b = batch["b"].clone().requires_grad_()
    (db,) = torch.autograd.grad(contrastive_loss_ref(batch["a"], b, 5.0, symmetric=False), b)
    found = torch.cat([tensor(x) for x in special("frozen")]) / len(results)
    assert (found - db).abs().max() < 1e-12


@pytest.mark.parametrize("name", worker_losses.DUAL_ENCODERS)
def test_transformers_dual_encoders_have_the_loss_and_the_gradients_of_the_global_batch(results, name):
    model = dual_encoders.make(name)
    loss = model(**dual_encoders.batch(12), return_loss=True).loss
    loss.backward()
    expected = {parameter: p.grad for parameter, p in model.named_parameters() if p.grad is not None}
    assert expected["logit_scale"].abs().max() > 1e-3
    for found in (result["dual encoders"][name] for result in results):
        assert abs(found["loss"] - loss.item()) < 1e-10 and found["gradients"].keys() == expected.keys()
        for parameter, gradient in expected.items():
            difference = tensor(found["gradients"][parameter]).reshape(gradient.shape) - gradient
            assert difference.abs().max() <= 1e-10 * gradient.abs().max() + 1e-14, parameter


@pytest.mark.parametrize("exchange", cases.EXCHANGES)
def test_late_interaction_takes_texts_as_long_as_each_rank_pads_them(results, exchange):
    batch, first = cases.batch(), cases.LAYOUTS[len(results)]["even"][0]
    tokens, mask = batch["tokens"].requires_grad_(), batch["b mask"]
    mask[:first, 2] = False
    loss = token_contrastive_loss_ref(tokens, batch["texts"], cases.SCALE, masks=(None, mask))
    (grad,) = torch.autograd.grad(loss, tokens)
    found = [result["ragged"][exchange] for result in results]
    assert all(abs(x["loss"] - loss.item()) < 1e-10 for x in found)
    assert (torch.cat([tensor(x["grad"]) for x in found]) / len(results) - grad).abs().max() < 1e-10
    lengths = (2, *[3] * (len(results) - 1))
    start = "global_token_contrastive_loss: b_mask must be given where ranks differ in T, got None"
    assert all(x["unmasked"] == f"{start} and T = {lengths}" for x in found)


@pytest.mark.parametrize("results", [2], indirect=True)
@pytest.mark.parametrize("name", [*derivatives.LOSSES, "`mmcore.nn.BatchNorm` over ranks"])
def test_other_derivatives_over_ranks_are_as_the_table_says(results, name) -> None:
    for mode in (*MODES, "`torch.compile`"):
        found = [result["derivatives"][name][mode] for result in results]
        if table()[name][mode] == "refused":
            assert all(isinstance(x, str) and re.search(REFUSED, x) for x in found), (mode, found)
            continue
        if mode == "`torch.compile`":
            expected = torch.cat([tensor(result["derivatives"][name]["plain"]) for result in results])
        else:
            expected = MODES[mode](derivatives.normalized_whole, cases.batch()["a"], torch.ones(()))
        assert (torch.cat([tensor(x) for x in found]) - expected).abs().max() <= 1e-5 * expected.abs().max(), mode
