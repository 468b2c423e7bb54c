"""What a plan says of ZeRO, against the real engine on one rank of eight, the others fake."""

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from mmcore.plan import zero
from mmcore.plan.clip_job import clip_job
from mmcore.plan.job import Setting
from tests.distributed.launch import ROOT, environment
from tests.distributed.worker_plan import SETTINGS

RANKS = 8


@cache
def counted() -> dict[tuple[int, str, int], dict[str, Any]]:
    command = [sys.executable, "-m", "tests.distributed.worker_plan", str(RANKS)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"zero"')]
    return {(line["zero"], line["precision"], line["accum"]): line for line in lines}


def setting(case: tuple[int, Any, int]) -> Setting:
    stage, precision, accum = case
    return Setting(2 * accum * RANKS, RANKS, stage, precision, accum, ema=True)


@pytest.mark.parametrize("case", SETTINGS, ids=str)
def test_the_traffic_of_zero_is_what_the_engine_sends(case: tuple[int, Any, int]) -> None:
    sent, expected = counted()[case]["sent"], zero.traffic(clip_job("tiny"), setting(case))
    reduced = sent.get("allreduce_", 0) + sent.get("_reduce_scatter_base_", 0)
    assert reduced == pytest.approx(expected["gradients"], rel=1e-3)
    assert sent.get("_allgather_base_", 0) == pytest.approx(expected.get("weights", 0), rel=1e-3)


@pytest.mark.parametrize("case", SETTINGS, ids=str)
def test_the_states_of_zero_are_what_the_engine_holds(case: tuple[int, Any, int]) -> None:
    found = zero.states(clip_job("tiny"), setting(case), is_cpu=True)
    expected = found.weights + found.optimizer + found.ema + found.gradients
    assert counted()[case]["held"] == pytest.approx(expected, rel=5e-3)
