"""One HTML page of a machine's benchmarks, which needs nothing beside itself: plots, tables and what they ran on."""

import base64
import html
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.report import summary
from bench.report.plots import OURS, bars, scaling, sweeps
from bench.report.tables import WHOLE, cases, op_of

STYLE = """
:root{--ink:#1f2937;--soft:#6b7280;--line:#e5e7eb;--ours:#0f766e;--wash:#f0fdfa}
*{box-sizing:border-box}
body{margin:0;color:var(--ink);background:#fafafa;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:36px 24px 80px}
h1{font-size:28px;margin:0 0 4px} h2{font-size:20px;margin:0;scroll-margin-top:16px}
p.lead{color:var(--soft);margin:0 0 22px;max-width:76ch}
section{background:#fff;border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin:0 0 22px}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px 24px;margin:0}
dt{color:var(--soft);font-size:12px;text-transform:uppercase;letter-spacing:.05em} dd{margin:0;font-weight:600}
nav{margin:0 0 22px} nav a{display:inline-block;margin:0 8px 8px 0;padding:4px 11px;border:1px solid var(--line);
border-radius:999px;background:#fff;color:var(--ink);text-decoration:none;font-size:13px}
nav a:hover{border-color:var(--ours);color:var(--ours)}
img{width:100%;height:auto;margin:14px 0 0} .scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;margin:14px 0 0;font-size:13px;font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:600;border-bottom:2px solid var(--line);white-space:nowrap}
th,td{padding:4px 10px;text-align:right} th:first-child,td:first-child{text-align:left}
td{border-bottom:1px solid #f3f4f6;white-space:nowrap}
tr.case td{padding-top:14px;font-weight:600;border-bottom:1px solid var(--line)}
tr.ours td{background:var(--wash);color:var(--ours);font-weight:600} td.best{font-weight:700;text-decoration:underline}
td.misfit{color:#b91c1c;text-align:left} .bar{display:inline-block;height:8px;border-radius:4px;background:#94a3b8;
margin-right:8px} tr.ours .bar{background:var(--ours)}
summary{cursor:pointer;color:var(--soft);margin-top:14px} .note{color:var(--soft);font-size:13px;margin:10px 0 0}
"""
LEAD = (
    "Median, 20th and 80th percentile of a call; memory beyond inputs and gradients; the largest error of a gradient "
    "against float64, relative to its largest element; and the share of the roofline, which is the time that the bare "
    "matrix products of an exact result take, or a copy of the bytes it must move, measured in the same run. "
    "What a cost model predicted from those rates stands beside ours."
)
HEAD = ("contender", "median ms", "p20 to p80", "predicted ms", "extra MiB", "error", "roofline")


def _image(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _number(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:,.0f}"


def _line(case: dict[str, Any], best: float) -> str:
    info, median = case["extra_info"], case["stats"]["median"]
    share, extra, error = info.get("roofline_share"), info.get("extra_bytes"), info.get("error_da")
    predicted = info.get("predicted_s")
    bar = ""
    if share is not None:
        bar = f'<span class="bar" style="width:{min(round(56 * share), 80)}px"></span>{100 * share:.0f} %'
    cells = [
        html.escape(info["contender"]),
        _number(median),
        f"{_number(info['p20_s'])} to {_number(info['p80_s'])}",
        "" if predicted is None else _number(predicted),
        "" if extra is None else f"{extra / 2**20:,.0f}",
        "" if error is None else f"{error:.1e}",
        bar,
    ]
    marks = ["", ' class="best"' if median == best else "", "", "", "", "", ""]
    row = "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks, cells))
    return f"<tr{' class=ours' if info['contender'] in OURS else ''}>{row}</tr>"


def _table(timed: list[dict[str, Any]], did_not_fit: list[dict[str, Any]]) -> str:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in timed:
        groups[case["group"]].append(case)
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in HEAD) + "</tr>"]
    for group, part in groups.items():
        lines.append(f'<tr class="case"><td colspan="{len(HEAD)}">{html.escape(group)}</td></tr>')
        best = min(case["stats"]["median"] for case in part)
        lines += [_line(case, best) for case in part]
        for case in did_not_fit:
            if case["group"] == group:
                name = html.escape(case["extra_info"]["contender"])
                lines.append(f'<tr><td>{name}</td><td class="misfit" colspan="{len(HEAD) - 1}">out of memory</td></tr>')
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _section(op: str, timed: list[dict[str, Any]], did_not_fit: list[dict[str, Any]], images: str) -> str:
    whole = [case for case in timed if case["group"].endswith(WHOLE)]
    parts = [case for case in timed if not case["group"].endswith(WHOLE)]
    rest = ""
    if parts:
        table = _table(parts, did_not_fit)
        rest = f"<details><summary>forward and backward by themselves</summary>{table}</details>"
    body = f"{images}{_table(whole, did_not_fit) if whole else ''}{rest}"
    return f'<section id="{html.escape(op)}"><h2>{html.escape(op)}</h2>{body}</section>'


def _facts(documents: list[dict[str, Any]]) -> str:
    info = documents[-1]["machine_info"]
    days = sorted({document["datetime"][:10] for document in documents})
    shown = {name: info[name] for name in ("device", "cpu", "torch", "triton", "python") if name in info}
    shown["measured"] = " to ".join(dict.fromkeys((days[0], days[-1])))
    shown["commits"] = ", ".join(
        dict.fromkeys(document.get("commit_info", {}).get("id", "?")[:9] for document in documents)
    )
    facts = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in shown.items())
    peers = "; ".join(f"{name} {fact}" for name, fact in info.get("peers", {}).items())
    note = f'<p class="note">Peers: {html.escape(peers)}.</p>' if peers else ""
    return f"<section><dl>{facts}</dl>{note}</section>"


def figures(documents: list[dict[str, Any]]) -> dict[str, dict[str, Figure]]:
    """By op its plots: "scaling" by batch size where there is one, "peers" where others were timed."""
    timed = [case for document in documents for case in cases(document)]
    did_not_fit = [case for document in documents for case in document.get("out_of_memory", [])]
    found: dict[str, dict[str, Figure]] = {op: {} for op in dict.fromkeys(op_of(case) for case in timed)}
    for op, sweep in sweeps(timed, did_not_fit).items():
        found[op]["scaling"] = scaling(sweep)
    for op, plots in found.items():
        if (figure := bars(op, [case for case in timed if op_of(case) == op])) is not None:
            plots["peers"] = figure
    return found


def page(title: str, documents: list[dict[str, Any]], plots: dict[str, dict[str, Figure]]) -> str:
    """The page, of the documents of one machine and the figures of `figures`."""
    timed: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for document in documents:
        for case in cases(document):
            timed[op_of(case)].append(case)
    did_not_fit = [case for document in documents for case in document.get("out_of_memory", [])]
    links = "".join(f'<a href="#{html.escape(op)}">{html.escape(op)}</a>' for op in timed)
    sections = "".join(
        _section(op, part, did_not_fit, "".join(_image(f, f"{op}, {kind}") for kind, f in plots[op].items()))
        for op, part in timed.items()
    )
    glance = ""
    if summary.rivals(documents):
        image = _image(summary.figure(documents), "ours against the best other contender, by op")
        glance = f"<section><h2>At a glance</h2>{image}</section>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><main><h1>{html.escape(title)}</h1><p class="lead">{LEAD}</p>{_facts(documents)}'
        f"{glance}<nav>{links}</nav>{sections}</main></body></html>\n"
    )


def write(folder: Path, documents: list[dict[str, Any]]) -> list[Path]:
    """Writes the page and each plot as a PNG into the folder; returns their paths, the page's first."""
    plots = figures(documents)
    target = folder / "report.html"
    target.write_text(page(f"mmcore bench: {documents[-1]['machine_info']['device']}", documents, plots))
    written = [target]
    if summary.rivals(documents):
        written.append(folder / "summary.png")
        summary.figure(documents).savefig(written[-1], dpi=130)
    for op, kinds in plots.items():
        for kind, figure in kinds.items():
            written.append(folder / f"{op.replace('[]', '-variants')}-{kind}.png")
            figure.savefig(written[-1], dpi=130)
    return written
