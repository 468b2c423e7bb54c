"""All ops at a glance: ours against the best of the others, at the largest case and over all cases."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from bench.report.plots import FAINT, INK, OUR_COLOUR, OURS, dress, ratio_axis
from bench.report.tables import WHOLE, cases, op_of, ran_on

HEAD = (
    "op",
    "largest case",
    "ours ms",
    "best other",
    "ms",
    "faster",
    "extra MiB, ours and theirs",
    "all cases: best other / ours",
)


@dataclass(frozen=True)
class Rival:
    """A case: ours, and the fastest of the others; seconds, and bytes beyond inputs and gradients."""

    group: str
    ours_s: float
    ours_bytes: int | None
    name: str
    other_s: float
    other_bytes: int | None

    @property
    def ratio(self) -> float:
        return self.other_s / self.ours_s


def rivals(documents: list[dict[str, Any]]) -> dict[str, list[Rival]]:
    """By op, its variants included, the cases of its whole work that another contender ran too."""
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for document in documents:
        for case in cases(document):
            if case["group"].endswith(WHOLE):
                groups[case["group"]][case["extra_info"]["contender"]] = case
    found: dict[str, list[Rival]] = defaultdict(list)
    for group, contenders in groups.items():
        # "mmcore, captions padded" is a way of ours too; the first is the one that a user gets
        ours, others = [], []
        for name, case in contenders.items():
            (ours if name.split(",")[0] in OURS else others).append(case)
        if ours and others:
            best = min(others, key=lambda case: case["stats"]["median"])
            name = best["extra_info"]["contender"]
            found[op_of(best).removesuffix("[]")].append(Rival(group, *_costs(ours[0]), name, *_costs(best)))
    return dict(found)


def table(documents: list[dict[str, Any]], ops: tuple[str, ...] = ()) -> str:
    """In Markdown, a line an op (all, or those named, in their order), under what they ran on."""
    lines = [
        "; ".join(dict.fromkeys(map(ran_on, documents))),
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    by_op = rivals(documents)
    for op in ops or by_op:
        found = by_op[op]
        at = _largest(found)
        ratios = [rival.ratio for rival in found]
        cells = (
            op,
            at.group.removeprefix(op).strip(),
            f"{1e3 * at.ours_s:.2f}",
            at.name,
            f"{1e3 * at.other_s:.2f}",
            f"{at.ratio:.2f}x",
            " and ".join("?" if n is None else f"{n / 2**20:.0f}" for n in (at.ours_bytes, at.other_bytes)),
            f"{min(ratios):.2f}x to {max(ratios):.2f}x, {len(ratios)}" if len(ratios) > 1 else f"{ratios[0]:.2f}x",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(documents: list[dict[str, Any]]) -> Figure:
    """A line an op, from its worst case to its best, and a dot at its largest."""
    found = rivals(documents)
    shown = Figure(figsize=(10.5, 1.2 + 0.34 * len(found)), layout="constrained")
    axes = shown.subplots()
    dress(axes)
    axes.grid(visible=False, axis="y")
    for y, part in enumerate(found.values()):
        ratios = [rival.ratio for rival in part]
        axes.plot([min(ratios), max(ratios)], [y, y], color=FAINT, lw=7, solid_capstyle="round", zorder=1)
        axes.plot(ratios, [y] * len(ratios), "|", ms=9, mew=1.2, color="#6b7280", zorder=2)
        at = _largest(part)
        axes.plot(at.ratio, y, "o", ms=8, color=OUR_COLOUR, zorder=3)
        axes.annotate(
            f"{at.ratio:.2f}x, {at.name}",
            (max(ratios), y),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.axvline(1, color=OUR_COLOUR, lw=2)
    ratio_axis(axes, [rival.ratio for part in found.values() for rival in part], room=3.0)
    axes.set_yticks(range(len(found)), list(found), fontsize=9)
    axes.set_ylim(len(found) - 0.4, -0.6)
    title = "time of the best other contender against ours: each case a tick, the largest a dot"
    shown.suptitle(title, color=INK, fontweight="bold", x=0.01, ha="left")
    return shown


def _costs(case: dict[str, Any]) -> tuple[float, int | None]:
    return case["stats"]["median"], case["extra_info"].get("extra_bytes")


def _largest(found: list[Rival]) -> Rival:
    return max(found, key=lambda rival: rival.ours_s)
