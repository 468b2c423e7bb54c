"""A CPU's products: alike by every way there is, and which of them is taken."""

import json
import re
from pathlib import Path

import pytest
import torch

from mmkernels import _gemm, _products


@pytest.mark.parametrize("calls_onednn", [True, False])
def test_a_product_of_any_strides_is_as_close_to_float64_as_torchs(
    calls_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gemm, "CALLS_ONEDNN", calls_onednn)
    torch.manual_seed(0)
    for x, y in (
        (torch.randn(37, 19), torch.randn(5, 19)),
        (torch.randn(19, 37).T, torch.randn(19, 5).T),
        (torch.randn(37, 38)[:, ::2], torch.randn(10, 19)[::2]),
        (torch.randn(0, 19), torch.randn(5, 19)),
    ):
        gold = x.double() @ y.double().T
        bound = 2 * (x @ y.T - gold).abs() + 4 * torch.finfo(torch.float32).eps * x.norm() * y.norm()
        assert ((_gemm.matmul_nt(x, y) - gold).abs() <= bound).all()


@pytest.mark.parametrize("way", [way for way in _products.available("bfloat16") if way != "widened"] or ["none"])
def test_bfloat16_operands_give_float32_sums_of_any_strides(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "none":
        pytest.skip("this processor has no products of bfloat16, or the native step is not built")
    monkeypatch.setattr(_gemm, "LOW", way)
    torch.manual_seed(0)
    for rows, cols, depth in (
        (1, 1, 1),
        (7, 70, 3),
        (100, 130, 515),
        (397, 65, 256),
        (33, 64, 257),
        (5, 3, 0),
        (0, 4, 8),
    ):
        for x_last, y_last in ((1, 1), (0, 1), (1, 0), (0, 0)):
            x, y = (torch.randn(n, depth).bfloat16() for n in (rows, cols))
            x, y = (t if last else t.T.contiguous().T for t, last in ((x, x_last), (y, y_last)))
            gold = x.double() @ y.double().T
            bound = 4 * torch.finfo(torch.float32).eps * (x.double().abs() @ y.double().abs().T)
            found = _gemm.matmul_nt(x, y)
            assert found.dtype == torch.float32 and ((found - gold).abs() <= bound).all()
            wide = torch.ones(rows, cols + 3)
            _gemm.add_matmul(wide[:, :cols], x, y.T)
            assert ((wide[:, :cols] - 1 - gold).abs() <= bound + 1e-6).all() and (wide[:, cols:] == 1).all()
    x, y = torch.randn(60, 40).bfloat16()[:, ::2], torch.randn(30, 20).bfloat16()[::3]
    torch.testing.assert_close(_gemm.matmul_nt(x, y), x.float() @ y.float().T, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(_gemm.LOW == "widened", reason="this processor has no products of bfloat16")
def test_no_bit_of_a_product_depends_on_the_threads() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(900, 520).bfloat16(), torch.randn(300, 520).bfloat16()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((_gemm.matmul_nt(x, y), _gemm.matmul(x.T, x)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


class TestWhichWayIsTaken:
    """Measured once, kept in the user's cache; what the environment says goes first."""

    @pytest.fixture(autouse=True)
    def two_ways(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.delenv(_products.VARIABLE, raising=False)
        monkeypatch.setattr(_products, "available", lambda dtype: _products.WAYS[dtype][:2])
        return tmp_path / "mmkernels/products.json"

    @pytest.mark.parametrize(("ms", "way"), [((1.0, 0.5), "onednn"), ((1.0, 0.9), "torch"), ((1.0, 2.0), "torch")])
    def test_the_faster_by_a_quarter_and_the_same_the_next_time(
        self, two_ways: Path, monkeypatch: pytest.MonkeyPatch, ms: tuple[float, float], way: str
    ) -> None:
        monkeypatch.setattr(_products, "_measured", lambda dtype, has: dict(zip(has, ms, strict=True)))
        assert _products.chosen("float32")[:2] == (way, "measured now")
        monkeypatch.setattr(_products, "_measured", lambda dtype, has: pytest.fail("measured twice"))
        assert _products.chosen("float32").way == way and two_ways.is_file()

    def test_a_damaged_cache_and_one_that_cannot_be_written_are_measured_anew(
        self, two_ways: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_products, "_measured", lambda dtype, has: dict.fromkeys(has, 1.0))
        assert _products.chosen("float32").why == "measured now"
        [key] = json.loads(two_ways.read_text())["float32"]
        for damaged in ('{"float32": ', "[]", json.dumps({"float32": {key: {}}})):
            two_ways.write_text(damaged)
            assert _products.chosen("float32").why == "measured now"
        assert json.loads(two_ways.read_text())["float32"]
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
        assert _products.chosen("float32").why == "measured now"

    def test_the_environment_decides_or_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(_products.VARIABLE, "float32=onednn")
        assert _products.chosen("float32") == ("onednn", "MMKERNELS_PRODUCTS says so", {})
        for said, sentence in (
            ("bfloat16=amx", "bfloat16 must be one of widened, avx512 on this processor, got amx"),
            ("float64=mkl", "must be made of float32=torch|onednn or bfloat16=widened|avx512|amx, got float64=mkl"),
        ):
            monkeypatch.setenv(_products.VARIABLE, said)
            with pytest.raises(ValueError, match=re.escape(sentence)):
                _products.chosen("bfloat16")

    def test_a_library_that_is_wrong_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_products, "product_onednn", lambda x, y: x @ y.T * 1.001)
        assert set(_products._measured("float32", ("torch", "onednn"))) == {"torch"}
