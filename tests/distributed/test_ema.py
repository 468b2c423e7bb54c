"""EMA under ZeRO 0 to 3 on two ranks against a plain module's EMA of the same weights, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmcore.ema import EMA
from tests.distributed.launch import run_ranks
from tests.distributed.tiny import Averaged

RUNS: list[dict[str, Any]] = [
    {"id": "zero0", "zero": 0, "precision": "fp32", "teacher": "bf16"},
    {"id": "zero1", "zero": 1, "precision": "fp32", "teacher": "fp32", "buffers": "average"},
    {"id": "zero3-persistent", "zero": 3, "precision": "fp32"},
    {
        "id": "zero2-round-robin", "zero": 2, "precision": "fp32", "teacher": "bf16", "buffers": "average",
        "zero_optimization": {"round_robin_gradients": True},
    },
    {
        "id": "zero3-sub-groups", "zero": 3, "precision": "fp32",
        "zero_optimization": {"sub_group_size": 60, "stage3_param_persistence_threshold": 13},
    },
    {"id": "zero1-bf16", "zero": 1, "precision": "bf16", "teacher": "bf16"},
    {
        "id": "zero1-bf16-fp32-gradients", "zero": 1, "precision": "bf16", "teacher": "fp32",
        "config": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    {
        "id": "zero3-bf16", "zero": 3, "precision": "bf16",
        "zero_optimization": {"stage3_param_persistence_threshold": 0},
    },
    {
        "id": "zero2-bf16-offloaded", "zero": 2, "precision": "bf16", "teacher": "bf16",
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "config": {"zero_force_ds_cpu_optimizer": False},
    },
    {
        "id": "zero3-offloaded", "zero": 3, "precision": "fp32",
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        "config": {"zero_force_ds_cpu_optimizer": False},
    },
    {"id": "zero2-bf16-ours", "zero": 2, "precision": "bf16", "teacher": "bf16", "ours": True},
    {"id": "zero3-bf16-persistent", "zero": 3, "precision": "bf16", "buffers": "average"},
]  # fmt: skip


BY_ID = pytest.mark.parametrize("run", RUNS, ids=[run["id"] for run in RUNS])
Runs = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of each setting, in this order; each loads what the one before saved, the first what one process did."""
    folder = tmp_path_factory.mktemp("ema")
    ema = EMA(Averaged())
    ema.num_updates = 41
    ema.save(folder / "first.safetensors")
    torch.save(ema.averages | ema.buffer_averages, folder / "first.pt")
    return folder, run_ranks("worker_ema", 2, folder, runs=RUNS)


@BY_ID
def test_two_ranks_average_teach_swap_and_load_as_one_process_does_to_the_bit(runs: Runs, run: dict[str, Any]) -> None:
    results = [result[run["id"]] for result in runs[1]]
    for result in results:
        assert result["averages"] == result["averages after"] == result["exported"] == []
        assert result["num_updates"] == 6
        # an update communicates for a teacher alone, once a parameter group
        assert result["collectives"] == ["_allgather_base_"] * (2 if run["zero"] in (1, 2) else 0)
        # swapped, it computes with the averages, and all comes back
        assert result["shown"] == {"computes": True, "changed": [], "computes as before": True, "moved": True}
        if run["zero"] < 3:
            assert result["teacher"] == [] and result["teacher computes"]
        loaded = result["loaded"]  # in another stage, or of one process
        assert loaded["averages"] == loaded.get("teacher", []) == []
        assert loaded["num_updates"] == (41 if run is RUNS[0] else 6)
    held, whole = [result["held"] for result in results], results[0]["whole"]
    assert sum(held) == (whole if run["zero"] else 2 * whole)
    assert max(held) < whole or run["zero"] == 0


@BY_ID
def test_a_file_of_two_ranks_is_read_by_one_process(runs: Runs, run: dict[str, Any]) -> None:
    path = runs[0] / f"{run['id']}.safetensors"
    expected = torch.load(path.with_suffix(".pt"), weights_only=True)
    stored = load_file(path)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(x, expected[name].to(x.dtype)) for name, x in stored.items())
    assert stored["body.0.weight"].dtype == torch.float32
    ema = EMA(Averaged())
    ema.load(path)
    assert ema.num_updates == 6 and all(torch.equal(x, expected[name]) for name, x in ema.averages.items())


@BY_ID
def test_what_cannot_be_is_refused_on_every_rank(runs: Runs, run: dict[str, Any]) -> None:
    for result in runs[1]:
        refused = result[run["id"]]["refused"]
        assert refused["save"].startswith("FileNotFoundError: ")
        assert "got a difference in ['bias', 'body.0.bias', 'body.0.weight']" in refused["load"]
        assert refused["unfrozen"].startswith("ValueError: EMA: model's frozen.weight must be frozen")
        if run["zero"]:
            assert refused["state"].endswith("model must hold its weights, got parts of ZeRO: use EMA.save")
            assert "EMA: engine must keep its fp32 weights" in refused["flats"]
        if run["zero"] == 3:
            assert "EMA: teacher must be under ZeRO stage 0, 1 or 2, got 3, " in refused["teacher"]


def test_a_momentum_encoder_of_an_engine_is_the_single_process_one_and_ranks_share_a_queue(runs: Runs) -> None:
    for result in runs[1]:
        assert result["momentum"]["teacher"] == [] and result["momentum"]["state"].endswith("use EMA.save")
        # 0 1 10 11 2, then 3 12 13 in the places of the oldest
        assert result["momentum"]["queue"] == [3.0, 12.0, 13.0, 11.0, 2.0]
