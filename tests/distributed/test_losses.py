"""The loss over the global batch on W ranks against one process, in float64."""

import pytest
import torch

from mmcore.losses import global_contrastive_loss
from tests.distributed import tiny
from tests.distributed.launch import run_ranks


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    return run_ranks("worker_losses", request.param, tmp_path_factory.mktemp("losses"))


@pytest.fixture(scope="module")
def truth():
    model = tiny.TwoTower(torch.float64)
    loss = tiny.eager_loss(*model(*tiny.batch(12, 0, torch.float64)))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_every_rank_has_the_loss_of_the_global_batch(results, truth):
    for result in results:
        assert abs(result["loss"] - truth[0]) < 1e-10


def test_mean_of_the_ranks_gradients_is_the_gradient_of_the_global_batch(results, truth):
    for name, expected in truth[1].items():
        assert expected.abs().max() > 1e-3, f"{name}: the check needs a gradient that is not zero"
        for result in results:
            found = torch.tensor(result["gradients"][name], dtype=torch.float64)
            assert (found - expected).abs().max() < 1e-10, name


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gradients_under_zero_0_to_3_are_those_of_one_process(num_ranks, truth, tmp_path):
    for result in run_ranks("worker_float64", num_ranks, tmp_path):
        for zero in "0123":
            assert abs(result[zero]["loss"] - truth[0]) < 1e-10
            assert result[zero]["gradients"].keys() == truth[1].keys()
            for name, expected in truth[1].items():
                found = torch.tensor(result[zero]["gradients"][name], dtype=torch.float64)
                assert (found - expected).abs().max() < 1e-10, (zero, name)


def test_uneven_ranks_are_an_error_on_every_rank_not_a_hang(results):
    for result in results:
        assert "same number of rows on every rank, got 3 to 4" in result["uneven"]


def test_without_a_process_group_it_is_the_plain_loss():
    model = tiny.TwoTower(torch.float64)
    outputs = model(*tiny.batch(12, 0, torch.float64))
    assert abs(global_contrastive_loss(*outputs) - tiny.eager_loss(*outputs)) < 1e-12
