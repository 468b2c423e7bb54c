"""A run that is saved and resumed, at the same and at another ZeRO stage and number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore import checkpoint
from mmcore.train.state import read_state
from tests.distributed.launch import run_ranks

WHOLE, HALF = 6, 3


OTHERS: dict[str, dict[str, Any]] = {
    "sgd-zero2": {"zero": 2, "optim": {"optimizer": "sgd", "lr": 1.0, "clip_each": 0.02}},
    "lars-zero1": {"zero": 1, "optim": {"optimizer": "lars", "lr": 10.0}},
    "muon-zero1": {"zero": 1, "optim": {"optimizer": "muon", "weight_decay_end": 0.4}},
    # still frozen when it is saved
    "frozen-zero0": {"zero": 0, "frozen_until": HALF + 1},
    "frozen-zero3": {"zero": 3, "frozen_until": HALF + 1},
    "frozen-bf16": {"zero": 1, "frozen_until": HALF + 1, "precision": "bf16"},
}
SETTINGS: dict[str, dict[str, Any]] = OTHERS | {
    f"{precision}-zero{zero}": {"zero": zero, "precision": precision}
    for zero, precision in [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Per stage on 2 ranks: an unbroken run, and one that goes on from where that was saved half-way."""
    folder = tmp_path_factory.mktemp("resume")
    runs = []
    for name, common in SETTINGS.items():
        root = folder / name
        runs += [
            {"id": f"{name}-whole", "steps": WHOLE, "save_at": HALF, "save": str(root), **common},
            {"id": f"{name}-resumed", "steps": WHOLE, "resume": str(root / f"step-{HALF:08d}"), **common},
        ]
    return folder, run_ranks("worker_engine", 2, folder, runs=runs)


def state(folder: Path, run: str) -> dict:
    return torch.load(folder / f"{run}.pt", weights_only=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_run_is_bit_equal_to_an_unbroken_one(saved, name):
    folder, results = saved
    assert results[0][f"{name}-resumed"]["losses"] == results[0][f"{name}-whole"]["losses"][HALF:]
    whole, resumed = state(folder, f"{name}-whole"), state(folder, f"{name}-resumed")
    assert whole.keys() == resumed.keys()
    for key, tensors in whole.items():
        for parameter, value in tensors.items():
            assert torch.equal(value, resumed[key][parameter]), (key, parameter)


@pytest.fixture(scope="module")
def elsewhere(saved):
    """Each stage's checkpoint, continued by one process at another stage."""
    folder, _ = saved
    runs = [
        {"id": f"{a}-to-{b}", "zero": b, "steps": WHOLE, "resume": str(folder / f"fp32-zero{a}/step-{HALF:08d}")}
        for a, b in [(0, 3), (1, 1), (2, 2), (3, 3), (3, 0), (1, 2)]
    ]
    return run_ranks("worker_engine", 1, folder / "elsewhere", runs=runs)


@pytest.mark.parametrize("move", ["0-to-3", "1-to-1", "2-to-2", "3-to-3", "3-to-0", "1-to-2"])
def test_checkpoint_moves_to_another_stage_and_number_of_ranks(saved, elsewhere, move):
    folder, results = saved
    expected = results[0][f"fp32-zero{move[0]}-whole"]["losses"][HALF:]
    torch.testing.assert_close(elsewhere[0][move]["losses"], expected, rtol=2e-6, atol=2e-6)
    whole, moved = state(folder, f"fp32-zero{move[0]}-whole"), state(folder / "elsewhere", move)
    for key in ("weight", "ema"):
        for parameter, value in whole[key].items():
            assert (value - moved[key][parameter]).abs().max() < 1e-4, (key, parameter)  # 1 % of a step, lr = 1e-2


def test_a_checkpoint_is_json_and_safetensors_and_a_damaged_one_is_refused_by_the_name_of_its_file(saved):
    written = checkpoint.step_folder(saved[0] / "fp32-zero2", HALF)
    assert {p.suffix for p in written.iterdir()} == {".json", ".safetensors"}
    assert read_state(written)["step"] == HALF and read_state(written)["note"] == "kept"
    path = written / "ema-00000.safetensors"
    data = path.read_bytes()
    for damaged, message in ((data[:-1], ""), (data[:-1] + bytes([data[-1] ^ 1]), ""), (None, " is missing")):
        checkpoint.verify(written)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"damaged: ema-00000.safetensors{message}"):
            checkpoint.verify(written)
        path.write_bytes(data)
