"""Contenders are called as they were read: fakes with their recorded signatures, which compute what their documentation
says, agree with ours through the calls of bench."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cross_attentions, peers
from bench.cross_attentions import WORKLOADS, Workload, contenders, operands, serves
from bench.interval_rivals import bounds, endpoints
from bench.ops import contrastive, late, linear_cross_entropy, sigmoid
from bench.peers import PEERS, Peer, facts, missing
from mmkernels import attention, masks

CPU = torch.device("cpu")


def signed(text: str, does: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a recorded signature: a call that it would refuse is refused."""
    made: dict[str, Any] = {}
    exec(f"def recorded({text}): pass", {"torch": torch}, made)
    signature = inspect.signature(made["recorded"])

    def call(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        return does(**bound.arguments)

    return call


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes peers be there, as modules with these names."""

    def install(**modules: dict[str, Any]) -> None:
        found = {name: SimpleNamespace(**module) for name, module in modules.items()}
        monkeypatch.setattr(peers, "_found", lambda name: found.get(name, "is not installed"))

    return install


def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# Liger 0.8.5, QuACK 0.6.5, cut-cross-entropy 25.1.1
LIGER = (
    "_input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, "
    "reduction='mean', softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False, "
    "return_token_accuracy=False, return_predicted_tokens=False, *, impl=None, mode=None, backend=None"
)
QUACK = "x, weight, target, chunk_size=4096, ignore_index=-100, reduction='mean', tuned=True, use_scaled_exp=None"
SIGLIP = "img_features, txt_features, log_temperature, bias, use_fp8=False, backend='auto'"
CCE = "e, c, targets, ignore_index=-100, softcap=None, reduction='mean', shift=False, filter_eps='high', impl='cce'"


def test_linear_cross_entropies_are_called_as_they_were_read(installed: Callable[..., None]) -> None:
    chosen = []

    def liger(_input: Tensor, weight: Tensor, target: Tensor, impl: str, accum_dtype: Any, **rest: Any) -> Any:
        chosen.append((impl, accum_dtype))
        return linear_cross_entropy.eager(_input, weight, target), None, None, None

    module = {"fused_linear_cross_entropy": signed(LIGER, liger)}
    quack = signed(QUACK, lambda x, weight, target, **rest: linear_cross_entropy.eager(x, weight, target))
    cce = signed(CCE, lambda e, c, targets, **rest: linear_cross_entropy.eager(e, c, targets))
    installed(
        liger=module,
        liger_cute=module,
        quack={"chunked_linear_cross_entropy": quack},
        cut_cross_entropy={"linear_cross_entropy": cce},
    )
    hidden, weight, targets = linear_cross_entropy.head(9, 8, 33, 0, torch.float32, CPU)
    calls = linear_cross_entropy.contenders()
    expected = gradients(calls["mmkernels"](hidden, weight, targets), (hidden, weight))
    assert set(linear_cross_entropy.PEERS) <= set(calls)
    for name in linear_cross_entropy.PEERS:
        assert_same(gradients(calls[name](hidden, weight, targets), (hidden, weight)), expected)
    assert chosen == [("nvidia-triton", torch.float32), ("nvidia-cutedsl", torch.float32)]


def test_contrastive_and_sigmoid_peers_are_called_as_they_were_read(installed: Callable[..., None]) -> None:
    """inf-cl 1.2.1, siglip-kernel 0.1.2."""

    def flash(q: Tensor, k: Tensor, labels: Any, scale: Any, head_dim: int) -> Tensor:
        assert labels is None and q.shape[1] % head_dim == 0
        return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")

    def siglip(
        img_features: Tensor, txt_features: Tensor, log_temperature: Tensor, bias: Tensor, **rest: Any
    ) -> Tensor:
        assert rest == {"use_fp8": False, "backend": "auto"}
        return sigmoid.eager(img_features, txt_features, log_temperature.exp(), bias)

    cce = signed(CCE, lambda e, c, targets, **rest: F.cross_entropy(e @ c.T, targets))
    installed(
        inf_cl={"cal_flash_loss": signed("q, k, labels=None, scale=None, head_dim=256", flash)},
        cut_cross_entropy={"linear_cross_entropy": cce},
        **{"siglip-kernel": {"fused_siglip_loss": signed(SIGLIP, siglip)}},
    )
    leaves = contrastive.features(7, 128, torch.float32, CPU)
    calls = contrastive.contenders()
    for name in ("inf_cl", "cut_cross_entropy"):
        assert_same(gradients(calls[name](*leaves), leaves), gradients(calls["mmkernels"](*leaves), leaves))
    leaves = sigmoid.trained(7, 16, torch.float32, CPU)
    calls = sigmoid.contenders()
    assert_same(gradients(calls["siglip-kernel"](*leaves), leaves), gradients(calls["mmkernels"](*leaves), leaves))


def test_late_interaction_is_called_as_it_was_read(installed: Callable[..., None]) -> None:
    """late-interaction-kernels 0.4.5: sums over the first's tokens of the best of the second's, [Nq, Nd]."""

    def maxsim(Q: Tensor, D: Tensor, **rest: Any) -> Tensor:
        return torch.einsum("mqd,ntd->mnqt", Q, D).amax(3).sum(2)

    recorded = "Q, D, q_mask=None, d_mask=None, *, normalize=False, backward=None"
    installed(late_interaction={"maxsim": signed(recorded, maxsim)})
    leaves = late.operands({"M": 6, "Q": 5, "N": 6, "T": 3, "D": 16}, torch.float32, CPU)
    expected = gradients(late.CONTENDERS["mmkernels"](*leaves), leaves)
    for name in ("eager", "late_interaction"):
        assert_same(gradients(late.CONTENDERS[name](*leaves), leaves), expected)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Of `seen` [B or 1, Lq, Lk], zero where nothing is."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=q.shape[1] != k.shape[1])
    return out.nan_to_num(0.0).transpose(1, 2)


def seen_by_endpoints(ends: Tensor, num_batches: int, num_keys: int) -> Tensor:
    """What cuDNN frontend 1.32 documents: [0, F0), then [F1, F2), ..."""
    assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.shape[0] == 1 and ends.shape[1] % 2 == 1
    assert (ends.diff(dim=1) >= 0).all() and (ends >= 0).all() and (ends <= num_keys).all()
    keys = torch.arange(num_keys)
    of_query = ends[0].unflatten(1, (num_batches, -1))[..., None]  # [nfunc, B, Lq, 1]
    seen = keys < of_query[0]
    for lo, hi in zip(of_query[1::2], of_query[2::2]):
        seen = seen | ((lo <= keys) & (keys < hi))
    return seen


def seen_by_bounds(rows: Tensor | None, causal: bool, num_queries: int, num_keys: int) -> Tensor:
    """What Paddle documents of FlashMask: a key is not seen from its first bound on, and not before its second or,
    where causal, by earlier queries."""
    queries = torch.arange(num_queries)[:, None]
    seen = torch.ones(1, num_queries, num_keys, dtype=torch.bool)
    if causal:
        seen = seen & (queries >= torch.arange(num_keys))
    if rows is None:
        return seen
    assert rows.dtype == torch.int32 and rows.shape[1:] == (1, num_keys, 1 if causal else 2)
    bounds = rows[:, 0, None].unbind(-1)
    return seen & (queries < bounds[0]) & (True if causal else queries >= bounds[1])


def cudnn() -> dict[str, Any]:
    plan = "mask_func, q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    call = "q, k, v, *, mask_plan, softmax_scale=None, deterministic=False, return_lse=False, return_max_logit=False"
    return {
        "create_mask_plan": signed(
            plan + "pack_gqa=None, build_backward=None",
            lambda mask_func, q, k, v, **rest: seen_by_endpoints(mask_func, len(q), k.shape[1]),
        ),
        "flex_attn_func": signed(call, lambda q, k, v, mask_plan, **rest: dense_attention(q, k, v, mask_plan)),
    }


def paddle() -> dict[str, Any]:
    recorded = (
        "query, key, value, startend_row_indices=None, *, dropout=0.0, causal=False, window_size=None, "
        "return_softmax_lse=False, return_seed_offset=False, fixed_seed_offset=None, rng_name='', training=True, "
        "name=None, softmax_scale=None, block_mask=None"
    )

    def attend(
        query: Tensor, key: Tensor, value: Tensor, startend_row_indices: Any, causal: bool, **rest: Any
    ) -> Tensor:
        with torch.enable_grad():
            seen = seen_by_bounds(startend_row_indices, causal, query.shape[1], key.shape[1])
            for x in (query, key, value):
                x.requires_grad_()
            return dense_attention(query, key, value, seen)

    return {
        "utils": SimpleNamespace(dlpack=SimpleNamespace(from_dlpack=torch.from_dlpack)),
        "nn": SimpleNamespace(functional=SimpleNamespace(flashmask_attention=signed(recorded, attend))),
        "grad": torch.autograd.grad,
    }


SMALL = {"B": 2, "H": 2, "Hkv": 1, "Lq": 16, "Lk": 16, "K": 8}
MASKED = ("BLIP", "Q-Former ITM", "Q-Former ITG", "OpenFlamingo", "Llama-3.2-Vision", "LLaVA packed", "resampler")


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("library", ["cudnn", "flashmask"])
def test_masks_of_intervals_are_put_as_the_libraries_take_them(
    name: str, library: str, installed: Callable[..., None]
) -> None:
    installed(cudnn=cudnn(), flashmask=paddle())
    published, keys = WORKLOADS[name], {"OpenFlamingo": 20, "Llama-3.2-Vision": 24}.get(name, 16)
    shape = {**SMALL, "Lk": keys}
    workload = Workload(shape, {}, published.mask, first_keys=5 if published.first_keys else 0)
    if not serves(library, workload, shape):
        assert library == "flashmask" and name in ("OpenFlamingo", "Llama-3.2-Vision")
        return
    calls, leaves = contenders(workload, shape, CPU), operands(shape, torch.float32, CPU)
    expected = gradients(calls["mmkernels"](*leaves).square().sum(), leaves)
    for _ in range(2):  # a plan serves the calls that follow
        assert_same(gradients(calls[library](*leaves).square().sum(), leaves), expected)


def test_two_intervals_are_ends_in_order_whichever_comes_first_and_may_be_empty() -> None:
    lo, hi = torch.tensor([[5, 2, 3]]), torch.tensor([[8, 2, 6]])
    lo2, hi2 = torch.tensor([[0, 1, 0]]), torch.tensor([[3, 4, 0]])
    mask = masks.intervals(9, *(x.int() for x in (lo, hi, lo2, hi2)))
    ends = endpoints(mask, {"B": 2, "Lq": 3, "Lk": 9}, CPU)
    assert torch.equal(seen_by_endpoints(ends, 2, 9), mask.to_dense()[:, 0].expand(2, -1, -1))
    assert endpoints(None, {"B": 2, "Lq": 3, "Lk": 9}, CPU).tolist() == [[[9] * 6]]


def test_a_key_whose_queries_have_a_gap_has_no_bounds() -> None:
    seen = torch.tensor([[True, True], [False, True], [True, True]])[None, None]
    with pytest.raises(ValueError, match="queries that lie together"):
        bounds(seen, {"B": 1, "Lq": 3, "Lk": 2}, CPU)
    assert bounds(None, SMALL, CPU) == (None, False)


def test_flex_attention_by_flash_attn_4_is_asked_for_by_its_name(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, enable_gqa: bool, kernel_options: Any) -> Tensor:
        asked.append(kernel_options)
        return q

    installed(flex_flash={})
    monkeypatch.setattr(cross_attentions, "flex_attention", flex)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    leaves = operands(SMALL, torch.float32, CPU)
    contenders(Workload(SMALL, {}), SMALL, CPU)["flex_flash"](*leaves)
    assert asked == [{"BACKEND": "FLASH"}]


def test_the_version_that_was_read_stands_beside_a_peer_or_the_reason_why_it_is_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = (
        "cudnn cut_cross_entropy flash_attn_2 flash_attn_3 flash_attn_4 flashmask flex_flash inf_cl late_interaction"
    )
    for name in [*named.split(), "liger", "liger_cute", "quack", "siglip-kernel"]:
        assert PEERS[name].read and f"({PEERS[name].read} was read)" in facts()[name]
    lacking = Peer("json", "none", "nothing", needs_gpu=False, read="1", needs="no_such_module")
    monkeypatch.setattr(peers, "PEERS", {"lacking": lacking})
    peers._found.cache_clear()
    assert facts() == {"lacking": "needs no_such_module, which is not installed (1 was read)"}
    assert missing("lacking") is not None


def test_ours_is_what_the_fakes_are_held_to() -> None:
    leaves = operands(SMALL, torch.float32, CPU)
    seen = torch.ones(1, 16, 16, dtype=torch.bool)
    torch.testing.assert_close(attention(*leaves), dense_attention(*leaves, seen))
