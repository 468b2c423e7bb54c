"""A CPU's float32 products, alike in both libraries; oneDNN's are called unless the processor is Intel's."""

import pytest
import torch

from mmkernels import _gemm


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
