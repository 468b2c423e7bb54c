"""Markdown tables of what the kernels compile to, and of what a cycle model predicts from it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRODUCTS = (
    "kernel", "tile", "warps", "stages", "registers", "shared KiB", "programs", "loads", "product", "a turn",
    "epilogue", "a logit", "bytes/FLOP", "predicted %", "bound by",
)  # fmt: skip
MEMORY = (
    "kernel", "block", "warps", "registers", "shared KiB", "programs", "an element", "bytes", "predicted %", "bound by",
)  # fmt: skip
WORDS = 3


def load(path: Path) -> dict[str, Any]:
    """The document.

    Raises:
        ValueError: a file that is missing, or that `python -m bench static --json` did not write.
    """
    if not path.is_file():
        raise ValueError(f"bench tables: FILE must be what `bench static` writes, got {path}, which does not exist")
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or "is_predicted" not in document:
        raise ValueError(f"bench tables: FILE must be what `bench static` writes, got {path}")
    return document


def markdown(document: dict[str, Any], kernels: tuple[str, ...] = ()) -> str:
    """A table of kernels of products and one of those that main memory bounds, of all or of those whose names begin so,
    under a line that says what they are."""
    lines = [
        f"**Predicted, not measured**: sm_{document['arch']} ({document['chip']['name']}), compiled by triton "
        f"{document['triton']}; shares of the roofline low, mid and high by the model's assumptions."
    ]
    rows = [
        row
        for row in document["rows"]
        if row["element"] != "fp32" and (not kernels or row["kernel"].startswith(kernels))
    ]
    of_products = [_of_products(row) for row in rows if row["loops"]]
    of_memory = [_of_memory(row) for row in rows if not row["loops"]]
    for head, part in ((PRODUCTS, of_products), (MEMORY, of_memory)):
        if part:
            numbers = [name in ("kernel", "loads", "product", "bound by") for name in head]
            lines += ["", _line(head), "|" + "".join("---|" if x else "---:|" for x in numbers), *map(_line, part)]
    return "\n".join([*lines, *_layers(rows)])


def _layers(rows: list[dict[str, Any]]) -> list[str]:
    """A table of attention's kernels in the layers that were predicted, in bfloat16."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for layer, ms in ((row["prediction"] or {}).get("layers") or {}).items():
            found.setdefault(layer, {}).setdefault(row["row"].rpartition("_")[0], ms)
    if not found:
        return []
    passes = list(dict.fromkeys(name for layer in found.values() for name in layer))
    head = ("layer", *(f"{name} ms" for name in passes), "all ms")
    lines = ["", _line(head), "|---|" + "---:|" * (len(head) - 1)]
    for layer, of_pass in found.items():
        total = [sum(x) for x in zip(*of_pass.values(), strict=True)]
        lines.append(_line((layer, *(_ms(of_pass[name]) for name in passes), _ms(total))))
    return lines


def _ms(levels: Sequence[float]) -> str:
    return ", ".join(f"{ms:.3g}" for ms in levels)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _name(row: dict[str, Any]) -> str:
    """The kernel, its flags unless they are many, and its row."""
    op, *flags = row["kernel"].split("-")
    name = row["kernel"] if len(flags) < WORDS else op
    return name if row["row"] in name else f"{name} {row['row']}"


def _predicted(row: dict[str, Any]) -> tuple[str, str]:
    found = row["prediction"]
    if found is None:
        return "", ""
    return ", ".join(f"{100 * x:.0f}" for x in found["share"]), found["limit"]


def _launch(row: dict[str, Any]) -> tuple[str, ...]:
    return str(row["registers"]) + (
        f", stack {row['stack']}" if row["stack"] else ""
    ), f"{row['shared_bytes'] / 1024:.0f}"


def _of_products(row: dict[str, Any]) -> tuple[str, ...]:
    found = row["prediction"] or {}
    loops = row["loops"]
    turns = [f"{sum(x['turn'].values())}" + (", joined" if x["is_fused"] else "") for x in loops]
    product = loops[0]["product"]
    useful, flops = found.get("useful_flops"), loops[0]["flops"]
    if useful and flops > useful:
        product += f", {flops / useful:.2f} times"
    return (
        _name(row),
        "x".join(map(str, row["tile"])),
        str(row["warps"]),
        str(row["stages"]),
        *_launch(row),
        f"{row['programs']}, {row['programs_limit']}",
        loops[0]["loads"],
        product,
        " / ".join(turns),
        " / ".join(dict.fromkeys(_range(x) for x in loops)),
        f"{found['per_logit']:.1f}" if found else "",
        f"{found['bytes_per_flop']:.4f}" if found else "",
        *_predicted(row),
    )


def _range(loop: dict[str, Any]) -> str:
    least, most = loop["epilogue_least"], sum(loop["epilogue"].values())
    return f"{most}" if least == most else f"{least} to {most}"


def _of_memory(row: dict[str, Any]) -> tuple[str, ...]:
    found, tile = row["prediction"] or {}, row["tile"]
    return (
        _name(row),
        str(max(tile[:2])),
        str(row["warps"]),
        *_launch(row),
        str(row["programs"]),
        f"{found['per_element']:.1f}" if found else "",
        f"{found['bytes_per_element']:.0f}" if found else "",
        *_predicted(row),
    )
