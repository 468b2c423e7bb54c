"""Who computes an attention call, and that each who may is held to the same contract."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.contract import check
from bench.ops.attention import BIAS, CAUSAL, DENSE, PLAIN
from bench.spec import OpSpec
from mmkernels import attention, attention_ref, masks
from mmkernels._device import INTERPRETED
from mmkernels.attention import backends, libraries, op
from mmkernels.attention.backends import NAMES, Call, pick, refusal
from mmkernels.attention.libraries import LIBRARIES
from tests.kernels.attention_fakes import asking, install

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel of ours runs here")

CALL = Call(2048, 2048, 1, 64, torch.bfloat16, architecture=90, mask="none", has_gradient=False, features=frozenset())
CPU = replace(CALL, architecture=0, dtype=torch.float32)
TRAINED = replace(CALL, has_gradient=True)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_FOUND", {})
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)


SHAPE = {"B": 2, "H": 2, "Hkv": 2, "Lq": 33, "Lk": 65, "K": 16}
SQUARE = SHAPE | {"Lq": 65}


def square_causal(spec: OpSpec) -> OpSpec:
    """The causal variant without its slopes."""

    def make_inputs(*arguments: Any) -> dict[str, Any]:
        return {n: x for n, x in spec.make_inputs(*arguments).items() if n != "alibi_slopes"}

    return replace(spec, name="attention[square causal]", make_inputs=make_inputs)


class TestEachIsHeldToTheContract:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("spec", [PLAIN, square_causal(CAUSAL), DENSE, BIAS], ids=lambda spec: spec.name)
    def test_torchs_own(self, spec: OpSpec, dtype: torch.dtype) -> None:
        check(asking(spec, "sdpa"), SQUARE, "random", dtype, seeds=range(4))

    @pytest.mark.parametrize("name", [name for name in NAMES if name[:4] in ("flas", "xfor", "cudn")])
    def test_those_of_others_by_their_signatures(self, name: str, installed: None) -> None:
        for spec in (PLAIN, square_causal(CAUSAL)):
            check(asking(spec, name), SHAPE, "random", torch.float32, seeds=range(2))

    def test_slopes_are_flash_attn_2s_too(self, installed: None) -> None:
        check(asking(CAUSAL, "flash_attn_2"), SHAPE, "random", torch.float32, seeds=range(2))

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", [name for name in NAMES if name not in ("mmkernels", "sdpa")])
    def test_those_that_this_gpu_has(self, name: str) -> None:
        major = torch.cuda.get_device_capability()[0]
        call = replace(CALL, architecture=80 if major <= 8 else 90 if major == 9 else 100)
        if (reason := refusal(name, call)) is not None:
            pytest.skip(reason)
        shape = SQUARE | {"K": 64}
        for spec in (PLAIN, square_causal(CAUSAL)):
            check(asking(spec, name), shape, "random", torch.bfloat16, "cuda", seeds=range(4))


class TestWhoIsPicked:
    @pytest.mark.parametrize(
        ("call", "expected"),
        [
            (replace(CPU, num_queries=4), "sdpa"), (replace(CPU, dtype=torch.float64), "sdpa"),
            (replace(CPU, mask="float", features=frozenset({"a bias with a gradient"})), "mmkernels"),
            (replace(CPU, mask="float", features=frozenset({"a bias wider than q"})), "mmkernels"),
            (replace(CPU, mask="causal", num_keys=4096), "mmkernels"),
            (replace(CPU, mask="intervals"), "mmkernels"),
            (replace(CPU, features=frozenset({"dropout_p"})), "mmkernels"),
            (replace(CPU, features=frozenset({"return_lse"})), "mmkernels"), (CALL, "sdpa"),
            (replace(CALL, mask="causal"), "sdpa"), (replace(CALL, mask="causal", num_keys=4096), "mmkernels"),
            (replace(CALL, num_queries=32), "mmkernels"), (replace(CALL, mask="intervals"), "mmkernels"),
            (replace(CALL, mask="bool"), "mmkernels"), (TRAINED, "mmkernels"),
        ],
        ids=repr,
    )  # fmt: skip
    def test_alone(self, call: Call, expected: str, nothing_installed: None) -> None:
        assert pick(call, None) == expected

    @pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
    def test_a_plain_call_on_a_cpu_is_the_native_steps_or_torchs(
        self, mask: str, path: str, nothing_installed: None
    ) -> None:
        assert pick(replace(CPU, mask=mask), None) == ("mmkernels" if path == "native" else "sdpa")

    @pytest.mark.parametrize(
        ("architecture", "expected"), [(80, "flash_attn_2"), (90, "flash_attn_3"), (100, "flash_attn_4")]
    )
    def test_for_a_gradient_the_flash_attention_of_the_gpu(
        self, architecture: int, expected: str, installed: None
    ) -> None:
        assert pick(replace(TRAINED, architecture=architecture), None) == expected
        assert pick(replace(TRAINED, architecture=architecture, mask="bool"), None) == "mmkernels"

    def test_of_the_tensors_of_a_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = []
        monkeypatch.setattr(op, "FEW_WEIGHTS", 0)
        monkeypatch.setattr(op, "pick", lambda call, name: found.append(call) or pick(call, name))
        q, k = torch.randn(2, 5, 4, 8, requires_grad=True), torch.randn(2, 7, 2, 8)
        attention(q, k, k, mask=masks.causal(5, 7), dropout_p=0.5)
        attention(q.detach(), (k, k), (k, k), mask=masks.lengths(torch.tensor([3, 4]), 5, 14))
        with torch.no_grad():
            attention(q, k, k, mask=masks.dense(torch.zeros(5, 7)), return_lse=True)
        attention(q[:, :0], k, k, mask=masks.dense(torch.ones(1, 7, dtype=torch.bool)), empty_rows="uniform")
        nothing = frozenset({"empty_rows='uniform'", "an empty batch or no keys"})
        first = Call(5, 7, 2, 8, torch.float32, 0, "causal", True, frozenset({"dropout_p"}))
        assert found == [
            first,
            # a CPU joins two segments
            replace(first, num_keys=14, mask="intervals", has_gradient=False, features=frozenset()),
            replace(first, mask="float", has_gradient=False, features=frozenset({"return_lse"})),
            replace(first, num_queries=0, mask="bool", features=nothing),
        ]

    def test_of_few_weights_the_mask_is_made_unless_it_has_a_name(
        self, monkeypatch: pytest.MonkeyPatch, aten_steps: None
    ) -> None:
        found = []
        monkeypatch.setattr(op, "pick", lambda call, name: found.append(call.mask) or pick(call, name))
        q, k = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8)
        for mask in (masks.causal(7), masks.lengths(torch.tensor([3, 4]), 7, 7)):
            torch.testing.assert_close(attention(q, k, k, mask=mask), attention_ref(q, k, k, mask=mask))
        attention(q, (k, k), (k, k), mask=masks.causal(7, 14))
        assert found == ["causal", "bool", "bool"]

    def test_a_mask_that_is_narrowed_is_not_causal(self) -> None:
        both = masks.causal(5) & masks.lengths(torch.tensor([3]), 5, 5)
        assert masks.causal(5).is_causal and masks.causal(5).to("cpu").is_causal and not both.is_causal


REFUSED = {
    "slopes": ("sdpa", replace(CPU, features=frozenset({"alibi_slopes"})), "it has no alibi_slopes"),
    "two things": ("flash_attn_2", replace(CALL, features=frozenset({"return_lse", "dropout_p"})),
     "it has no dropout_p, return_lse"),
    "intervals": ("sdpa", replace(CPU, mask="intervals"), "it would store the mask as a matrix"),
    "two intervals": ("flashmask", replace(CALL, mask="intervals", structure=frozenset({"a second interval a query"})),
     "it takes intervals, but none with a second interval a query"),
    "no order": ("flex_flash", replace(TRAINED, mask="intervals", is_deterministic=True),
     "its gradient adds in no fixed order, and torch.use_deterministic_algorithms is on"),
    "bool": ("flash_attn_3", replace(CALL, mask="bool"), "it has no bool mask"),
    "a mask of cuDNN": ("sdpa_cudnn", replace(CALL, mask="bool"), "it has no bool mask"),
    "lengths": ("sdpa", replace(CPU, mask="causal", num_keys=9), "its causal mask needs as many queries as keys"),
    "dtype": ("flash_attn_2", replace(CALL, dtype=torch.float32), "it has no torch.float32"),
    "head dim": ("sdpa_cudnn", replace(CALL, head_dim=160), "K must be a multiple of 8 up to 128"),
    "odd head dim": ("flash_attn_3", replace(CALL, head_dim=36), "K must be a multiple of 8 up to 256"),
    "groups": ("xformers", replace(CALL, num_groups=2), "it has no groups of heads"),
    "a CPU": ("sdpa_flash", replace(CALL, architecture=0), r"it needs a GPU of sm_\(80, 90, 100\)"),
    "another GPU": ("flash_attn_3", replace(CALL, architecture=80), r"it needs a GPU of sm_\(90,\)"),
    "nothing there": ("flash_attn_2", CALL, "flash_attn is not installed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_backend_that_cannot_serve_says_why(case: str, nothing_installed: None) -> None:
    name, call, reason = REFUSED[case]
    with pytest.raises(ValueError, match=f"^attention: backend must be .*, got '{name}', .*: {reason}"):
        pick(call, name)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is looked for libraries in, of which none was imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(libraries, "_FOUND", {})
    for name in ("flash_attn", "flash_attn_interface"):
        # so that it is forgotten afterwards too
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]
    return tmp_path


def test_an_installation_that_is_broken_is_warned_of_once_and_not_picked(fresh: Path) -> None:
    (fresh / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c104')")
    call = replace(TRAINED, architecture=80)
    with pytest.warns(UserWarning, match="cannot be imported: undefined symbol"):
        assert pick(call, None) == "mmkernels"
    assert pick(call, None) == "mmkernels"
    with pytest.raises(ValueError, match="cannot be imported: undefined symbol: _ZN3c104"):
        pick(call, "flash_attn_2")


def test_a_part_that_a_release_lacks_is_not_installed(fresh: Path) -> None:
    (fresh / "flash_attn").mkdir()
    (fresh / "flash_attn" / "__init__.py").touch()
    assert refusal("flash_attn_4", CALL) == "flash_attn.cute is not installed"


def test_a_library_is_imported_while_a_first_call_is_compiled(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_missing` is a constant to Dynamo, which could trace no import."""
    (fresh / "flash_attn_interface.py").write_text(
        "def flash_attn_func(q, k, v, softmax_scale, causal, deterministic):\n    return softmax_scale * (q + k + v)\n"
    )
    library = replace(LIBRARIES["flash_attn_3"], only=None, dtypes=libraries.SINGLE)
    monkeypatch.setattr(backends, "LIBRARIES", {**LIBRARIES, "flash_attn_3": library})
    torch._dynamo.reset()
    compiled = torch.compile(partial(attention, backend="flash_attn_3", scale=2.0), fullgraph=True, backend="aot_eager")
    q, k, v = (torch.randn(2, 9, 2, 8) for _ in range(3))
    torch.testing.assert_close(compiled(q, k, v), 2.0 * (q + k + v))
