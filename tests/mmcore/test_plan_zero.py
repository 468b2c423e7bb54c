"""What a plan says of ZeRO, against the real engine on one rank of eight, the others fake."""

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from mmcore.plan import zero
from tests.distributed.launch import ROOT, environment
from tests.distributed.worker_plan import CASES, Case

RANKS = 8


@cache
def counted() -> dict[Case, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.distributed.worker_plan", str(RANKS)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {Case(*line["case"]): line for line in lines}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_traffic_of_zero_is_what_the_engine_sends(case: Case) -> None:
    sent, expected = counted()[case]["sent"], zero.traffic(case.job(), case.setting(RANKS))
    reduced = sent.get("allreduce_", 0) + sent.get("_reduce_scatter_base_", 0)
    assert reduced == pytest.approx(expected["gradients"], rel=1e-3, abs=128)  # some scalars
    assert sent.get("_allgather_base_", 0) == pytest.approx(expected.get("weights", 0), rel=1e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_states_of_zero_are_what_the_engine_holds(case: Case) -> None:
    found = zero.states(case.job(), case.setting(RANKS), is_cpu=True)
    expected = found.weights + found.optimizer + found.ema + found.gradients
    assert counted()[case]["held"] == pytest.approx(expected, rel=5e-3)
