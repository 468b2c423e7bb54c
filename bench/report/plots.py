"""Plots of benchmark cases: time and memory by batch size, and bars of contenders against ours."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report.tables import WHOLE

OURS = ("mmkernels", "mmcore")
OUR_COLOUR = "#0f766e"
COLOURS = ("#c2410c", "#4f46e5", "#a16207", "#be185d", "#0369a1", "#65a30d", "#7c3aed", "#475569")
FIXED = {"eager": COLOURS[0], "compile": COLOURS[1], "open_clip": COLOURS[2], "sdpa": COLOURS[4]}
INK, FAINT = "#1f2937", "#d1d5db"
SIZES = ("B", "M")
Points = dict[str, list[tuple[int, float]]]


@dataclass
class Sweep:
    """An op over batch sizes: by contender milliseconds, MiB and sizes that did not fit, and the roofline."""

    title: str
    times: Points = field(default_factory=lambda: defaultdict(list))
    memory: Points = field(default_factory=lambda: defaultdict(list))
    roofline: dict[int, float] = field(default_factory=dict)
    did_not_fit: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, case: dict[str, Any], size: int) -> None:
        info, median = case["extra_info"], 1e3 * case["stats"]["median"]
        self.times[info["contender"]].append((size, median))
        floor = median * info["roofline_share"]
        self.roofline[size] = min(self.roofline.get(size, floor), floor)
        if info.get("extra_bytes"):
            self.memory[info["contender"]].append((size, info["extra_bytes"] / 2**20))

    @property
    def contenders(self) -> list[str]:
        """Ours first."""
        return sorted({*self.times, *self.did_not_fit}, key=lambda name: (name not in OURS, name))


def _place(case: dict[str, Any]) -> tuple[tuple[str, ...], int] | None:
    """What a case shares with those of other batch sizes, and its own."""
    shape = (case.get("params") or {}).get("shape")
    shape = shape if isinstance(shape, dict) else {}
    axis = next((a for a in SIZES if a in shape), None)
    if axis is None or not case["group"].endswith(" both"):
        return None
    op, *dtype = case["group"].split()[:-2]
    # a square problem grows by both sides
    rest = (f"{a} = {n}" for a, n in shape.items() if a not in "BMN")
    return (op, *dtype, *rest), shape[axis]


def sweeps(cases: list[dict[str, Any]], did_not_fit: list[dict[str, Any]]) -> dict[str, Sweep]:
    """By op, in forward and backward: the widest series of batch sizes that the cases hold, of three or more."""
    found: dict[tuple[str, ...], Sweep] = {}
    for case in cases:
        if place := _place(case):
            found.setdefault(place[0], Sweep(", ".join(place[0]))).add(case, place[1])
    for case in did_not_fit:
        if (place := _place(case)) and place[0] in found:
            found[place[0]].did_not_fit[case["extra_info"]["contender"]].append(place[1])
    widest: dict[str, Sweep] = {}
    for key, sweep in found.items():
        if len(sweep.roofline) >= max(3, len(widest[key[0]].roofline) + 1 if key[0] in widest else 0):
            widest[key[0]] = sweep
    return widest


def _colours(contenders: list[str]) -> dict[str, str]:
    others = [name for name in contenders if name not in OURS and name not in FIXED]
    free = [c for c in COLOURS if c not in FIXED.values()]
    found = {name: free[i % len(free)] for i, name in enumerate(others)}
    return found | FIXED | dict.fromkeys(OURS, OUR_COLOUR)


def dress(axes: Axes) -> None:
    """The look of all plots."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, which="both", length=0)
    axes.grid(color=FAINT, alpha=0.6, lw=0.6)
    axes.set_axisbelow(True)


def scaling(sweep: Sweep) -> Figure:
    """Time and peak memory by batch size, log-log, a line a contender, with the roofline and what did not fit."""
    figure, colours = Figure(figsize=(10.5, 4.3), layout="constrained"), _colours(sweep.contenders)
    for axes, series, label in zip(
        figure.subplots(1, 2), (sweep.times, sweep.memory), ("ms", "MiB beyond inputs and gradients")
    ):
        dress(axes)
        if series is sweep.times:
            axes.plot(*zip(*sorted(sweep.roofline.items())), "--", color=INK, lw=1.2, label="roofline")
        for name in sweep.contenders:
            ours = name in OURS
            if points := sorted(series.get(name, [])):
                axes.plot(
                    *zip(*points),
                    marker="o",
                    ms=6 if ours else 4,
                    lw=2.6 if ours else 1.5,
                    color=colours[name],
                    label=name,
                    zorder=3 if ours else 2,
                )
        axes.set(xscale="log", yscale="log", xlabel="batch size", title=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(sweep.roofline), [f"{n:,}" for n in sorted(sweep.roofline)])
        axes.minorticks_off()
        _mark_misfits(axes, sweep, colours)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(sweep.title, color=INK, fontweight="bold", x=0.01, ha="left")
    return figure


def _mark_misfits(axes: Axes, sweep: Sweep, colours: dict[str, str]) -> None:
    """A cross at the upper edge for each size that a contender found no memory for, side by side."""
    for i, (name, sizes) in enumerate(sorted(sweep.did_not_fit.items())):
        axes.plot(
            sizes,
            [0.97 - 0.05 * i] * len(sizes),
            "x",
            ms=8,
            mew=2,
            color=colours[name],
            label=f"{name}: out of memory",
            transform=axes.get_xaxis_transform(),
        )


def bars(op: str, cases: list[dict[str, Any]]) -> Figure | None:
    """How many times as long as ours each contender takes, a group of bars a case; None where nothing compares."""
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for case in cases:
        if case["group"].endswith(WHOLE):
            groups[case["group"]][case["extra_info"]["contender"]] = case["stats"]["median"]
    rows: list[tuple[str, str, float]] = []
    for group, medians in groups.items():
        ours = next((medians[name] for name in OURS if name in medians), None)
        others = {name: t for name, t in medians.items() if name not in OURS}
        if ours is not None and others:
            rows += [(group, name, t / ours) for name, t in sorted(others.items(), key=lambda x: x[1])]
    if not rows:
        return None
    colours = _colours(sorted({name for _, name, _ in rows}))
    names = list(dict.fromkeys(group for group, _, _ in rows))
    figure = Figure(figsize=(10.5, 1.3 + 0.24 * (len(rows) + len(names))), layout="constrained")
    axes, y, ticks = figure.subplots(), 0.0, []
    dress(axes)
    axes.grid(visible=False, axis="y")
    for group in names:
        part = [row for row in rows if row[0] == group]
        ticks.append((y + (len(part) - 1) / 2, _short(group)))
        for _, name, ratio in part:
            axes.barh(y, ratio - 1, left=1, height=0.82, color=colours[name], label=name)
            away = ratio >= 1
            axes.annotate(
                f"{ratio:.2f}x",
                (ratio, y),
                xytext=(4 if away else -4, 0),
                textcoords="offset points",
                va="center",
                ha="left" if away else "right",
                fontsize=8,
                color=INK,
            )
            y += 1
        y += 1
    axes.axvline(1, color=OUR_COLOUR, lw=2)
    _finish_bars(figure, axes, rows, ticks)
    figure.suptitle(f"{op}: time against ours, which is the line", color=INK, fontweight="bold", x=0.01, ha="left")
    return figure


def _short(group: str) -> str:
    """Without the op's own name, which the title has, but with its variant."""
    variant = re.search(r"\[(.*)\]", group)
    _, *rest, _ = re.sub(r"\[.*\]", "", group).split()
    return " ".join(([variant[1].replace("_", " ")] if variant else []) + rest)


def ratio_axis(axes: Axes, ratios: list[float], *, room: float = 1.35) -> None:
    """A logarithmic axis of ratios, with room for words behind the largest."""
    low, high = min(0.8, min(ratios) / 1.25), max(1.25, max(ratios) * room)
    marks = [x for x in (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= x <= high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(marks, [f"{x:g}x" for x in marks])
    axes.minorticks_off()


def _finish_bars(
    figure: Figure, axes: Axes, rows: list[tuple[str, str, float]], ticks: list[tuple[float, str]]
) -> None:
    ratio_axis(axes, [ratio for _, _, ratio in rows])
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.set_ylim(max(at for at, _ in ticks) + 1.6, -1)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(
        unique.values(), unique.keys(), frameon=False, fontsize=8, loc="outside upper right", ncols=len(unique)
    )
