"""The report of benchmarks: a page that needs nothing beside itself, plots with what did not fit, tables."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as command
from bench.report.page import page, write
from bench.report.pages import fill
from bench.report.plots import bars, scaling, sweeps
from bench.report.summary import figure, rivals
from bench.report.tables import cases, load, op_of

BENCH = Path(__file__).parents[1] / "bench/results/cpu-2core/bench.json"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The committed one, where eager found no memory for the largest batch."""
    found = copy.deepcopy(load([BENCH])[0])
    group = "contrastive_loss float32 B8192-D512 both"
    missing = {"group": group, "extra_info": {"contender": "eager"}, "params": {"shape": {"B": 8192, "D": 512}}}
    found["out_of_memory"] = [missing]
    found["benchmarks"] = [
        case for case in found["benchmarks"] if (case["group"], case["extra_info"].get("contender")) != (group, "eager")
    ]
    found["machine_info"] |= {"peers": {"made_up": "is not installed"}}
    return found


def test_the_page_holds_every_op_and_contender_and_needs_nothing_beside_itself(document: dict[str, Any], tmp_path):
    written = write(tmp_path, [document])
    text = written[0].read_text()
    assert written[0].name == "report.html" and all(path.stat().st_size > 5000 for path in written)
    for case in cases(document):
        assert f'<section id="{op_of(case)}">' in text and case["group"] in text
        assert f"<td>{case['extra_info']['contender']}</td>" in text
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,|#)', text) == []
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert "out of memory" in text and "made_up is not installed" in text


def test_what_a_page_is_made_of_is_escaped(document: dict[str, Any]) -> None:
    info = document["machine_info"] | {"device": "<script>"}
    assert "<script" not in page("<script>", [document | {"benchmarks": [], "machine_info": info}], {})


def test_the_sweep_of_an_op_is_its_widest_series_of_batch_sizes(document: dict[str, Any]) -> None:
    sweep = sweeps(cases(document), document["out_of_memory"])["contrastive_loss"]
    assert sorted(sweep.roofline) == [64, 256, 1024, 2048, 4096, 8192]
    assert sweep.contenders[0] == "mmkernels"
    assert [size for size, _ in sweep.times["eager"]] == [64, 256, 1024, 2048, 4096]
    assert sweep.did_not_fit == {"eager": [8192]}
    # the roofline is the least that any contender's share of it gives
    case = next(c for c in cases(document) if c["group"] == "contrastive_loss float32 B4096-D512 both")
    floor = 1e3 * case["stats"]["median"] * case["extra_info"]["roofline_share"]
    assert sweep.roofline[4096] <= floor * (1 + 1e-9)


def test_a_plot_has_a_line_a_contender_the_roofline_and_a_cross_for_what_did_not_fit(document: dict[str, Any]) -> None:
    time, memory = scaling(sweeps(cases(document), document["out_of_memory"])["contrastive_loss"]).axes
    labels = [line.get_label() for line in time.lines]
    assert labels == ["roofline", "mmkernels", "compile", "eager", "open_clip", "eager: out of memory"]
    assert time.get_xscale() == time.get_yscale() == memory.get_yscale() == "log"
    assert np.asarray(time.lines[-1].get_xdata()).tolist() == [8192]


def test_bars_say_how_many_times_as_long_as_ours_the_others_take(document: dict[str, Any]) -> None:
    part = [case for case in cases(document) if op_of(case) == "contrastive_loss"]
    figure = bars("contrastive_loss", part)
    assert figure is not None
    both = [case for case in part if case["group"].endswith(" both")]
    medians = {(case["group"], case["extra_info"]["contender"]): case["stats"]["median"] for case in both}
    ratios = {f"{t / medians[group, 'mmkernels']:.2f}x" for (group, name), t in medians.items() if name != "mmkernels"}
    assert {text.get_text() for text in figure.axes[0].texts} == ratios
    assert bars("contrastive_loss", [case for case in part if case["extra_info"]["contender"] == "mmkernels"]) is None


def test_without_a_file_it_reports_each_machine_folder(document: dict[str, Any], tmp_path: Path, monkeypatch, capsys):
    few = document | {"benchmarks": cases(document)[:4]}
    for machine in ("one", "two"):
        (tmp_path / machine).mkdir()
        (tmp_path / machine / "bench.json").write_text(json.dumps(few))
        (tmp_path / machine / "plan.json").write_text('{"cases": {}}')  # not pytest-benchmark's
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    assert command.main(["report"]) == 0
    assert (tmp_path / "one/report.html").exists() and (tmp_path / "two/report.html").exists()
    assert "| case | contender |" in capsys.readouterr().out
    assert command.main(["report", str(tmp_path / "none.json")]) == 2
    assert "none.json, which does not exist" in capsys.readouterr().err


def made(group: str, **medians_ms: float) -> list[dict[str, Any]]:
    """Cases of contenders by their times."""
    infos = [{"contender": name.replace("_", " ", 1), "extra_bytes": 2**20 * i} for i, name in enumerate(medians_ms)]
    times = [{"median": ms / 1e3} for ms in medians_ms.values()]
    return [{"group": group, "extra_info": info, "stats": time} for info, time in zip(infos, times, strict=True)]


SUMMED = [
    *made("op float32 B8 both", mmkernels=2.0, eager=1.0, compile=3.0),
    *made("op[variant] float32 B64 both", mmkernels=10.0, eager=40.0, compile=25.0),
    *made("op float32 B64 forward", mmkernels=1.0, eager=900.0),
    *made("alone float32 B8 both", mmkernels=2.0),
    {"group": "train step", "extra_info": {"contender": "mmcore"}, "stats": {"median": 4.0}},
    {"group": "train step", "extra_info": {"contender": "mmcore, padded"}, "stats": {"median": 1.0}},
    {"group": "train step", "extra_info": {"contender": "eager"}, "stats": {"median": 6.0}},
]


def test_a_summary_sets_ours_against_the_best_other_at_each_ops_largest_case(document: dict[str, Any], tmp_path: Path):
    summed = document | {"benchmarks": SUMMED}
    ratios = {op: [rival.ratio for rival in found] for op, found in rivals([summed]).items()}
    assert ratios == {"op": [0.5, 2.5], "train": [1.5]}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/some.json").write_text(json.dumps(summed))
    (tmp_path / "results/plan.json").write_text("{}")
    (tmp_path / "page.md").write_text("<!-- summary: results -->\n<!-- end -->\n")
    fill(tmp_path / "page.md")
    *_, op, train, _ = (tmp_path / "page.md").read_text().splitlines()
    assert op == ("| op | [variant] float32 B64 both | 10.00 | compile | 25.00 | 2.50x | 0 and 2 | 0.50x to 2.50x, 2 |")
    assert train == "| train | step | 4000.00 | eager | 6000.00 | 1.50x | ? and ? | 1.50x |"
    axes = figure([summed]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["2.50x, compile", "1.50x, eager"]
    assert "At a glance" not in page("none", [document | {"benchmarks": []}], {})
