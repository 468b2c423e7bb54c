"""The Markdown table of image towers, from the JSON that `python -m bench towers` writes."""

import json
from pathlib import Path
from typing import Any

_ORDER = ("nothing", "pictures alone", "captions", "classes")


def load(path: Path) -> dict[str, Any]:
    """The document.

    Raises:
        ValueError: a file that is missing, or that `python -m bench towers` did not write.
    """
    document = json.loads(path.read_text()) if path.is_file() else {}
    if "rows" not in document or "images" not in document:
        raise ValueError(f"bench tables: FILE must be what `bench towers` writes, got {path}")
    return document


def markdown(document: dict[str, Any]) -> str:
    """A line for each tower, of the features that others read it by; of the untrained one of all, from the worst to the
    best among those that learned from the same."""
    rows = []
    for name, row in document["rows"].items():
        for read in [row["read"]] if row["read"] else row["figures"]:
            of = row["figures"][read]
            cells = f"| {name} | {row['learned from']} | {read} | {100 * of['k-NN']:.1f} | {100 * of['probe']:.1f} |"
            rows.append((_ORDER.index(row["learned from"]), of["probe"], f"{cells} {row['seconds']:.0f} |"))
    head = "| tower | learned from | read at | k-NN % | linear probe % | CPU seconds |\n|---|---|---|---:|---:|---:|"
    what = f"`--data {document['data']}`, {document['images']:,} images each, CPU, threads: {document['threads']}"
    lines = [f"{what}, torch {document['torch']}, {document['date']}", "", head]
    return "\n".join([*lines, *(line for *_, line in sorted(rows))])
