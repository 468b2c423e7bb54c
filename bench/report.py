"""Tables and a plot from the JSON that `pytest bench/ --benchmark-json` writes."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.conftest import COLUMNS, row


def load(paths: list[Path]) -> list[dict[str, Any]]:
    """The benchmark documents.

    Raises:
        ValueError: a file that is missing or is not pytest-benchmark's JSON.
    """
    documents = []
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"bench report: FILE must be pytest-benchmark's JSON, got {path}, which does not exist"
            )
        document = json.loads(path.read_text())
        if "benchmarks" not in document:
            raise ValueError(f"bench report: FILE must be pytest-benchmark's JSON, got {path}")
        documents.append(document)
    return documents


def cases(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The timed cases: those that say which contender they are."""
    return [case for case in document["benchmarks"] if "contender" in case["extra_info"]]


def markdown(document: dict[str, Any], *, ops: tuple[str, ...] = ()) -> str:
    """One Markdown table of the cases of forward and backward, of updates and of training steps, under a line that says
    on what they ran: of all ops or of those named, `op[]` being the variants of `op`."""
    info = document["machine_info"]
    lines = [
        f"{info['device']} ({info['cpu']}), torch {info['torch']}, {document['datetime'][:10]}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * 2 + "---:|" * (len(COLUMNS) - 2),
    ]
    for case in cases(document):
        op = re.sub(r"\[.*\]", "[]", case["group"].split()[0])
        if case["group"].endswith((" both", " update", " step")) and (not ops or op in ops):
            lines.append("| " + " | ".join(row(case)) + " |")
    return "\n".join(lines)


TABLE = re.compile(r"(<!-- bench: (\S+)((?: [\w\[\]-]+)*) -->\n)(.*?)(\n?<!-- end -->)", re.DOTALL)


def fill(page: Path) -> None:
    """Writes each `<!-- bench: FILE OP ... -->` table of a Markdown page anew from the FILE it names."""

    def table(found: re.Match[str]) -> str:
        document = load([page.parent / found[2]])[0]
        return f"{found[1]}{markdown(document, ops=tuple(found[3].split()))}\n<!-- end -->"

    page.write_text(TABLE.sub(table, page.read_text()))


def plot(document: dict[str, Any], path: Path, *, op: str = "contrastive_loss") -> None:
    """Time and peak memory of forward and backward by batch size, log-log, one line a contender, with the roofline."""
    times: dict[str, list[tuple[int, float]]] = defaultdict(list)
    memory: dict[str, list[tuple[int, float]]] = defaultdict(list)
    floor: dict[int, float] = {}
    for case in cases(document):
        info = case["extra_info"]
        if not case["group"].startswith(f"{op} ") or not case["group"].endswith(" both"):
            continue
        size, median = case["params"]["shape"]["B"], 1e3 * case["stats"]["median"]
        times[info["contender"]].append((size, median))
        floor[size] = min(floor.get(size, median), median * info["roofline_share"])
        if info.get("extra_bytes"):
            memory[info["contender"]].append((size, info["extra_bytes"] / 2**20))
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, series, label in zip(
        figure.subplots(1, 2), (times, memory), ("ms", "MiB beyond inputs and gradients")
    ):
        for name, points in series.items():
            xs, ys = zip(*sorted(points))
            axes.plot(xs, ys, marker="o", label=name, lw=2.4 if name == "mmkernels" else 1.4)
        if series is times:
            axes.plot(*zip(*sorted(floor.items())), "k--", lw=1, label="four bare products")
        axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    info = document["machine_info"]
    figure.suptitle(f"{op}, forward and backward, {info['device']} ({info['cpu']})")
    figure.savefig(path, dpi=130)
