"""Markdown tables from the JSON that `pytest bench/ --benchmark-json` writes."""

import json
import re
from pathlib import Path
from typing import Any

COLUMNS = ("case", "contender", "median ms", "p20", "p80", "predicted ms", "extra MiB", "error dA", "roofline %")
# what a case's mode is, for the tables that show the whole of an op's work and nothing else
WHOLE = (" both", " update", " step")


def load(paths: list[Path]) -> list[dict[str, Any]]:
    """The benchmark documents.

    Raises:
        ValueError: a file that is missing or is not pytest-benchmark's JSON.
    """
    documents = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"bench report: FILE must be pytest-benchmark's JSON, got {path}, which does not exist")
        document = json.loads(path.read_text())
        if "benchmarks" not in document:
            raise ValueError(f"bench report: FILE must be pytest-benchmark's JSON, got {path}")
        documents.append(document)
    return documents


def load_folder(folder: Path) -> list[dict[str, Any]]:
    """The benchmark documents among a folder's JSON files, by name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [document for document in found if "benchmarks" in document]


def cases(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The timed cases: those that say which contender they are."""
    return [case for case in document["benchmarks"] if "contender" in case["extra_info"]]


def op_of(case: dict[str, Any]) -> str:
    """The op's name, `op[]` of the variants of `op`."""
    return re.sub(r"\[.*\]", "[]", case["group"]).split()[0]


def ran_on(document: dict[str, Any]) -> str:
    """Device, torch and day."""
    info = document["machine_info"]
    return f"{info['device']} ({info['cpu']}), torch {info['torch']}, {document['datetime'][:10]}"


def row(case: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table, of one benchmark as pytest-benchmark's JSON has it."""
    info, median = case["extra_info"], 1e3 * case["stats"]["median"]
    predicted = info.get("predicted_s")
    extra, error, share = info.get("extra_bytes"), info.get("error_da"), info.get("roofline_share")
    return (
        case["group"],
        info["contender"],
        f"{median:.2f}",
        f"{1e3 * info['p20_s']:.2f}",
        f"{1e3 * info['p80_s']:.2f}",
        "" if predicted is None else f"{1e3 * predicted:.2f}",
        "" if extra is None else f"{extra / 2**20:.0f}",
        "" if error is None else f"{error:.1e}",
        "" if share is None else f"{100 * share:.0f}",
    )


def markdown(document: dict[str, Any], *, ops: tuple[str, ...] = ()) -> str:
    """One Markdown table of the cases of forward and backward, of updates and of training steps, under a line that says
    on what they ran: of all ops or of those named, `op[]` being the variants of `op`."""
    lines = [ran_on(document), "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * 2 + "---:|" * (len(COLUMNS) - 2)]
    for case in cases(document):
        if case["group"].endswith(WHOLE) and (not ops or op_of(case) in ops):
            lines.append("| " + " | ".join(row(case)) + " |")
    return "\n".join(lines)
