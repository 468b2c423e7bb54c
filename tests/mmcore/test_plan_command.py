"""`mmcore plan`: the search for what fits, transfers against a simulated transport, memory against a real run, and what
the command prints."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.measure import CLEAR_REFS
from bench.plan import QUICK, measured
from bench.plan_models import TrainedLlava
from bench.published import PAGES, TABLE, filled
from bench.scale import simulate
from mmcore.plan import command, zero
from mmcore.plan.exchange import loss
from mmcore.plan.hardware import GPUS
from mmcore.plan.job import Exchange, Setting
from mmcore.plan.memory import FILLED, fits, peak, phases
from mmcore.plan.report import changes, nearest
from mmcore.systems import entries
from mmcore.systems.clip.plan import clip_job
from mmcore.systems.llava.plan import Stage2Plan
from tests.distributed.launch import ROOT, environment
from tests.distributed.worker_plan import CASES, Case
from tests.refusals import refuses

JOB, GPU = clip_job("tiny"), GPUS["a100-40gb"]
LLAVA = TrainedLlava(256, 2).job()
RECIPES = [name for name in entries("RECIPES") if name in entries("PLANS")]
# no bucket of a GPU's size beside a model as small as that
CPU = replace(GPUS["h200"], is_cpu=True)


def test_a_plan_says_what_fits_and_the_nearest_setting_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["clip", "--model", "tiny", "--global-batch", "2097152", "--gpus", "8", "--gpu", "a100-40gb"]
    command.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    better, limit = found["nearest"], FILLED * 40e9
    assert not found["fits"] and found["memory"][found["peak"]]["total"] > limit
    assert found["peak"] == max(found["memory"], key=lambda phase: found["memory"][phase]["total"])
    assert better["fits"] and better["memory"][better["peak"]]["total"] <= limit
    assert better["samples_per_s"] > 0 and found["parameters"]["trained"] == JOB.trained
    command.main(arguments)
    said = capsys.readouterr().out
    assert "does not fit" in said and "nearest that fits: --" in said and "loss, features in a ring" not in said


def test_the_nearest_setting_changes_the_fewest_options_and_no_further_than_it_must() -> None:
    setting = Setting(2097152, 8)
    assert not fits(phases(JOB, setting, GPU), GPU)
    found = nearest(JOB, setting, GPU)
    assert found is not None and fits(phases(JOB, found, GPU), GPU)
    assert changes(setting, found) == {"--accum": found.accum}
    assert not fits(phases(JOB, replace(found, accum=found.accum // 2), GPU), GPU)
    # of settings that fit, the one asked for
    assert nearest(JOB, found, GPU) == found


def test_more_gpus_are_named_where_nothing_else_helps() -> None:
    fixed = replace(JOB, levers=("zero",))
    setting = Setting(2097152, 8)
    found = nearest(fixed, setting, GPU)
    assert found is not None and found.gpus > 8 and found.zero == setting.zero
    assert not fits(phases(fixed, Setting(2097152, found.gpus // 2), GPU), GPU)


@pytest.mark.parametrize(("setting", "changed"), [
    (Setting(64, 1, precision="fp32"), "--accum"),
    (Setting(64, 64, precision="fp32"), "--activation-checkpointing"),  # nothing is left to divide
], ids=["accum", "checkpointing"])  # fmt: skip
def test_llavas_memory_is_divided_by_what_costs_least(setting: Setting, changed: str) -> None:
    job = TrainedLlava(256, 6, num_tokens=2048).job()
    gpu = replace(CPU, memory_bytes=0.7 * peak(phases(job, setting, CPU)).total / FILLED)
    found = nearest(job, setting, gpu)
    assert found is not None and fits(phases(job, found, gpu), gpu) and list(changes(setting, found)) == [changed]


@pytest.mark.parametrize("name", RECIPES)
def test_a_plan_has_what_its_recipe_has_to_take_less_memory(name: str) -> None:
    """BLIP-2 refuses --accum, which all runs have."""
    config, train = entries("PLANS")[name].load(), entries("RECIPES")[name].load()
    options: dict[str, Any] = {"accum": 4} if train.accumulates else {}
    if hasattr(train(), "activation_checkpointing"):
        options["activation_checkpointing"] = True
    asked = config(64, 2, **options)
    assert asked.setting() == Setting(64, 2, **options) and asked.job().levers == (*options, "zero")
    assert all((name in options) == hasattr(config, name) for name in ("accum", "activation_checkpointing"))


def test_gradients_wait_beside_later_micro_batches() -> None:
    for job in (JOB, LLAVA):
        one, more = (phases(job, Setting(16, 1, accum=n), GPU)[0].parts["gradients"] for n in (1, 2))
        assert (one, more) == (0, 4 * job.trained)


def test_a_gpu_holds_the_images_that_its_forward_sees() -> None:
    """Of LLaVA those of a micro-batch; CLIP's recipe hands over all that meet in its loss."""
    for job, held in ((JOB, 16), (LLAVA, 4)):
        assert phases(job, Setting(16, 1, accum=4), GPU)[0].parts["batch"] == held * job.batch_bytes
        assert phases(job, Setting(16, 1, accum=4), CPU)[0].parts["batch"] == 16 * job.batch_bytes


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_the_loss_sends_what_is_planned_and_is_exact(how: str) -> None:
    found = simulate(8, how)
    assert found["sent_bytes"] == pytest.approx(found["planned_sent_bytes"], abs=64)  # some scalars
    assert max(found["errors"].values()) < 1e-13


def test_features_go_around_a_ring_where_gathering_would_not_fit() -> None:
    kept, ring = (loss(Exchange(768), 2048, ranks, is_cpu=False) for ranks in (128, 512))
    assert (kept.is_ring, ring.is_ring) == (False, True) and ring.gathered < kept.gathered / 10


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak of the resident size cannot be reset")
@pytest.mark.parametrize("name", QUICK)
def test_the_peak_of_a_run_is_planned_within_15_percent(name: str) -> None:
    found = measured(name)
    assert found["predicted_bytes"] == pytest.approx(found["measured_bytes"], rel=0.15), found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_the_pages_are_those_of_the_code(page: Path) -> None:
    """`python -m bench.published` writes them; that of the commands, which takes longer, is held in bench."""
    written = TABLE.sub(lambda found: "" if found[2] == "examples" else found[0], page.read_text())
    assert TABLE.search(written) and filled(written) == written


def test_adapters_take_the_states_of_the_language_models_weights_and_leave_more_to_the_backward() -> None:
    whole, adapted = (Stage2Plan(64, 8, llm="qwen2-0.5b", tokens=640, lora=rank).job() for rank in (None, 16))
    assert adapted.name == whole.name + " with adapters of rank 16"
    assert whole.trained > 494e6 and adapted.trained < 40e6 and adapted.frozen_low == 494_032_768
    of_whole, of_adapted = (phases(job, Setting(64, 8), GPU) for job in (whole, adapted))
    assert of_adapted[-1].parts["optimizer"] < 0.1 * of_whole[-1].parts["optimizer"]
    assert of_adapted[0].parts["activations"] > of_whole[0].parts["activations"]
    refuses("rank must be at least 1, got 0", Stage2Plan(64, 8, lora=0).job)


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
    expected = sum(found[part] for part in ("weights", "optimizer", "EMA", "gradients"))
    assert counted()[case]["held"] == pytest.approx(expected, rel=5e-3)
