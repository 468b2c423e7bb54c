"""A mask of intervals is the same one to every library that takes such, each in a form of its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from bench.contract import check
from bench.ops.attention import INTERVALS, PADDED, PLAIN
from bench.spec import OpSpec
from mmkernels import attention, attention_ref, masks
from mmkernels._device import INTERPRETED
from mmkernels.attention import libraries
from mmkernels.attention.backends import Call, refusal
from mmkernels.attention.problem import Problem
from mmkernels.attention.translations import FLEX_BLOCK, blocks_of
from tests.kernels.attention_fakes import asking, install
from tests.kernels.recorded import Operations
from tests.refusals import refuses

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel of ours runs here")

SHAPE = {"B": 2, "H": 2, "Hkv": 2, "Lq": 65, "Lk": 65, "K": 16}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def packed(causal: bool) -> masks.Intervals:
    ids = torch.tensor([[0] * 20 + [1] * 30 + [-1] * 15, [3] * 64 + [4]])
    return masks.documents(ids, causal=causal)


def sided(left: int, right: int) -> Tensor:
    places = torch.arange(65)
    return torch.stack([places >= left, places < right])


# of 65 queries and keys in two samples
MASKS: dict[str, Callable[[], masks.Intervals]] = {
    "packed": lambda: packed(True),
    "packed, both ways": lambda: packed(False),
    "lengths": lambda: masks.lengths(torch.tensor([0, 40]), 65, 65),
    "padding on one side": lambda: masks.key_padding(sided(9, 50), 65),
    "causal, padding on the left": lambda: masks.causal(65) & masks.key_padding(sided(9, 65), 65),
    "causal, padding on the right": lambda: masks.causal(65) & masks.key_padding(sided(0, 50), 65),
    "scattered": lambda: packed(True) & masks.key_padding(torch.arange(65)[None] % 3 > 0, 65),
    "prefix": lambda: masks.prefix_causal(torch.tensor([3, 30]), 65),
    "two intervals": lambda: masks.qformer_pairs(5, torch.tensor([0, 20]), 30),
}
EVERY = set(MASKS)
RUNS = {"packed", "packed, both ways", "lengths", "padding on one side", "causal, padding on the left"}
TAKEN = {
    **dict.fromkeys(("flash_attn_2", "flash_attn_3", "flash_attn_4"), RUNS),
    "flex": EVERY,
    "flex_flash": EVERY,
    "cudnn_flex": {"packed", "packed, both ways", "lengths", "prefix", "two intervals"},
    "flashmask": EVERY - {"two intervals"},
}


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 65, heads, 16, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", TAKEN)
def test_what_a_library_takes_it_computes_and_the_rest_it_refuses(name: str, backend: str, installed: None) -> None:
    inputs = operands()
    mask = MASKS[name]()
    if name not in TAKEN[backend]:
        with pytest.raises(ValueError, match=r"it takes intervals, but none with|mask must be runs of queries"):
            attention(*inputs, mask=mask, backend=backend)
        return
    found, expected = attention(*inputs, mask=mask, backend=backend), attention_ref(*inputs, mask=mask)
    torch.testing.assert_close(found, expected)


def without_lse(spec: OpSpec) -> OpSpec:
    def make_inputs(*arguments: Any) -> dict[str, Any]:
        return {n: x for n, x in spec.make_inputs(*arguments).items() if n not in ("return_lse", "alibi_slopes")}

    return replace(spec, make_inputs=make_inputs)


@pytest.mark.parametrize(("backend", "spec"), [("cudnn_flex", INTERVALS), ("flashmask", PADDED), ("flashmask", PLAIN)])
def test_gradients_too_are_held_to_the_contract(backend: str, spec: OpSpec, installed: None) -> None:
    check(asking(without_lse(spec), backend), SHAPE, "random", torch.float32, seeds=range(2))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", TAKEN)
def test_what_this_gpu_has_takes_the_same(name: str, backend: str) -> None:
    major = torch.cuda.get_device_capability()[0]
    call = Call(
        65, 65, 2, 64, torch.bfloat16, 80 if major <= 8 else 90 if major == 9 else 100, "none", True, frozenset()
    )
    reason = refusal(backend, call) if name in TAKEN[backend] else f"{backend} takes no such mask"
    if reason is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 65, heads, 64, generator=generator).cuda().bfloat16().requires_grad_() for heads in (4, 2, 2)
    ]
    mask = MASKS[name]().to("cuda")
    found: Any = attention(*inputs, mask=mask, backend=backend)
    expected: Any = attention_ref(*inputs, mask=mask)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    for one, other in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


def problem_of(mask: masks.Intervals, batch: int) -> Problem:
    q, k = torch.randn(batch, mask.num_queries, 1, 8), torch.randn(batch, mask.num_keys, 1, 8)
    ends = tuple(x for pair in mask.pairs for x in pair)
    return Problem(q, ((k, k),), ends, mask.keys, None, None, None, 1.0, 0.0)


PLACES = torch.arange(600)[None]
LONG: dict[str, Callable[[], masks.Intervals]] = {
    "causal": lambda: masks.causal(300, 600),
    "window": lambda: masks.intervals(600, (PLACES - 200).clamp(min=0), PLACES + 1),
    "packed": lambda: masks.documents(PLACES // 250),
    "media": lambda: masks.media(PLACES[:, :400] % 130 == 0, 4, 150),
    "padded": lambda: masks.causal(600) & masks.key_padding(torch.cat([PLACES > 130, PLACES % 300 < 280]), 600),
}


@pytest.mark.parametrize("name", LONG)
def test_the_blocks_of_flex_attention_are_those_that_it_finds_in_the_matrix(name: str) -> None:
    mask = LONG[name]()
    *lists, sees = blocks_of(problem_of(mask, mask.num_batches))
    lengths = mask.num_queries, mask.num_keys
    found = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=lengths)
    expected = create_block_mask(sees, mask.num_batches, 1, *lengths, device="cpu")
    for what in ("kv", "full_kv"):
        numbers = [getattr(x, f"{what}_num_blocks") for x in (found, expected)]
        assert torch.equal(*numbers)
        places = [getattr(x, f"{what}_indices") for x in (found, expected)]
        some = torch.arange(places[0].shape[3]) < numbers[0][..., None]
        assert torch.equal(*(torch.where(some, x, -1) for x in places))
    assert torch.equal(found.to_dense(), expected.to_dense())


def test_no_matrix_is_made_for_the_blocks() -> None:
    problem = problem_of(masks.causal(4096), 1)
    with Operations() as seen:
        blocks_of(problem)
    assert seen.largest <= 4096


def test_a_gradient_in_no_fixed_order_is_refused_where_torch_was_asked_for_one() -> None:
    call = Call(512, 512, 1, 64, torch.bfloat16, 90, "intervals", True, frozenset(), is_deterministic=True)
    assert "adds in no fixed order" in str(refusal("flex_flash", call))
    assert refusal("flex_flash", replace(call, has_gradient=False)) is None
    assert refusal("flex", call) is None
    torch.use_deterministic_algorithms(True)
    try:
        q, *keys = operands()
        refuses("in no fixed order", attention, q.requires_grad_(), *keys, mask=MASKS["prefix"](), backend="flex_flash")
    finally:
        torch.use_deterministic_algorithms(False)


def test_intervals_are_another_backends_by_name_alone(installed: None) -> None:
    call = Call(8192, 8192, 1, 64, torch.bfloat16, 90, "intervals", False, frozenset())
    assert {name for name in libraries.LIBRARIES if refusal(name, call) is None} == set(TAKEN)
