"""The report of benchmarks: a page that needs nothing beside itself, plots with what did not fit, tables."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import towers
from bench.report.page import page, write
from bench.report.pages import fill
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


def test_towers_stand_by_what_they_learned_from_and_how_well(tmp_path: Path) -> None:
    def row(source: str, read: str | None, **probes: float) -> dict[str, Any]:
        figures = {name.replace("_", " "): {"k-NN": 0.5, "probe": x} for name, x in probes.items()}
        return {"learned from": source, "read": read, "figures": figures, "seconds": 9.6}

    rows = {
        "vit": row("classes", "class token", class_token=0.9, mean=0.2),
        "better": row("pictures alone", "mean", class_token=0.1, mean=0.7),
        "worse": row("pictures alone", "mean", class_token=0.9, mean=0.6),
        "untrained": row("nothing", None, class_token=0.4, mean=0.3),
    }
    document = {"rows": rows, "images": 1000, "data": "scattered", "threads": 1, "torch": "2", "date": "2026"}
    (tmp_path / "x.json").write_text(json.dumps(document))
    (tmp_path / "page.md").write_text("<!-- towers: x.json -->\n<!-- end -->\n")
    fill(tmp_path / "page.md")
    lines = [line.split(" | ")[::4] for line in (tmp_path / "page.md").read_text().splitlines() if line[:2] == "| "]
    assert lines[1:] == [
        ["| untrained", "30.0"], ["| untrained", "40.0"], ["| worse", "60.0"], ["| better", "70.0"], ["| vit", "90.0"],
    ]  # fmt: skip
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="FILE must be what `bench towers` writes, got "):
        fill(tmp_path / "page.md")


def test_a_tower_is_trained_by_the_settings_of_its_proof_for_as_many_images_as_the_others() -> None:
    flags = "--data digits --inverted --views source --batch-size 64 --epochs 9 --lr 1e-3"
    words = towers.flags_of(flags, is_last=True)
    assert words[:6] == ["--views", "source", "--batch-size", "64", "--lr", "1e-3"]
    assert (
        words[-2:] == ["--steps", str(towers.IMAGES // 64)] and words.count("--data") == 1 and "--epochs" not in words
    )
    assert "--epochs" in towers.flags_of(flags, is_last=False)
    assert {"clip", "simclr", "vit", "blip2-stage1"} <= set(towers.known()) and "llava-stage2" not in towers.known()
    assert command.main(["towers", "vitt"]) == 2
