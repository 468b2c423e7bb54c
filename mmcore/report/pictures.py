"""Pictures of a run: its curves, and text queries with the images they find."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from mmcore.figures import is_share, shown
from mmcore.ops import require
from mmcore.report.drawing import COLOURS, FAINT, FONT_NOTE, INK, WRONG, colour_of, draw_image, mark, save
from mmcore.report.fonts import escape_undrawable, families_for, wrap


def plot_curves(records: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw loss, learning rate and held-out accuracy over the steps of a run, as one PNG whose folder is made.

    `records` are of metrics.jsonl: each with "step" and "loss" (else a ValueError), most with "lr", some with
    "eval/..." values. Where a step comes twice (a resumed run) the last counts. "eval/...loss" joins the loss; keys
    whose values all lie in [0, 1], and R^2, are accuracies, other keys are left out; "chance" is dashed.
    """
    require("plot_curves", len(records) > 0, "records must hold at least one record, got none")
    for i, record in enumerate(records):
        holds = "step" in record and "loss" in record
        require("plot_curves", holds, "each record must hold step and loss, got {} at {}", sorted(record), i)
    by_step = {int(record["step"]): record for record in records}
    rows = [by_step[step] for step in sorted(by_step)]
    held_out = _held_out_series(rows)
    accuracies = {
        name: series
        for name, series in held_out.items()
        if "loss" not in name and (all(0 <= x <= 1 for x in series[1]) or not is_share(name))
    }
    figure = Figure(figsize=(11 if accuracies else 6.5, 4.6), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 2 if accuracies else 1, height_ratios=(4, 1))
    loss_axes = figure.add_subplot(grid[0, 0])
    _draw_loss(loss_axes, rows, {k: s for k, s in held_out.items() if "loss" in k})
    _draw_rate(figure.add_subplot(grid[1, 0], sharex=loss_axes), rows)
    loss_axes.tick_params(labelbottom=False)
    if accuracies:
        _draw_accuracies(figure.add_subplot(grid[:, 1]), accuracies)
    save(figure, path)


def plot_retrieval(
    queries: Sequence[str],
    scores: Tensor,
    relevant: Tensor,
    images: Sequence[Any],
    path: str | Path,
    *,
    top_k: int = 5,
    title: str = "Text to image",
) -> None:
    """Draw each query with the images it finds, right ones framed green, wrong ones red, as one PNG whose folder is
    made.

    Args:
        queries: [Q] captions, in any script; characters that no font has are shown as code points, and it says so.
        scores, relevant: [Q, I] float and bool.
        images: [I]; each a PIL image or uint8 [H, W] or [H, W, 3].
        top_k: images a query, cut to I.
        title: what is searched by what.
    """
    shape = (len(queries), scores.shape[-1] if scores.ndim else 0)
    fits = all(shape) and scores.shape == relevant.shape == shape and relevant.dtype == torch.bool
    sentence = "scores and bool relevant must be [{}, I], not empty, got {} and {} {}"
    got = list(scores.shape), relevant.dtype, list(relevant.shape)
    require("plot_retrieval", fits, sentence, len(queries), *got)
    require("plot_retrieval", top_k >= 1, "top_k must be at least 1, got {}", top_k)
    top_k = min(top_k, shape[1])
    families = families_for(list(queries))
    figure = Figure(figsize=(2.9 + 1.4 * top_k, 0.75 + 1.6 * len(queries)), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.05, h_pad=0.05, wspace=0.02, hspace=0.02)
    grid = figure.add_gridspec(len(queries), top_k + 1, width_ratios=[2.0] + [1.0] * top_k)
    best = scores.float().cpu().argsort(dim=1, descending=True, stable=True)[:, :top_k]
    right = relevant.cpu().gather(1, best)
    undrawable = False
    for row, query in enumerate(queries):
        shown, lost = escape_undrawable(query, families)
        undrawable |= lost
        axes = figure.add_subplot(grid[row, 0])
        axes.axis("off")
        place = {"ha": "right", "va": "center", "transform": axes.transAxes, "family": families}
        axes.text(0.97, 0.5, wrap(shown, 24, 5), fontsize=10.5, color=INK, parse_math=False, **place)
        for column, index in enumerate(best[row].tolist()):
            axes = figure.add_subplot(grid[row, column + 1])
            is_right, score = bool(right[row, column]), float(scores[row, index])
            draw_image(axes, images[index], colour_of(is_right))
            axes.set_xlabel(f"{mark(is_right)} {score:.2f}", fontsize=8.5, color=colour_of(is_right), labelpad=4)
            if row == 0:
                axes.set_title(str(column + 1), fontsize=9, color=FAINT, pad=6)
    first = int(right[:, 0].sum())
    found = f"{title}: {first} of {len(queries)} queries find a right one first"
    figure.suptitle(found, fontsize=12, color=INK, fontweight="bold")
    if undrawable:
        figure.supxlabel(FONT_NOTE, fontsize=8.5, color=WRONG)
    save(figure, path)


def _held_out_series(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("eval/") and isinstance(value, int | float) and math.isfinite(value):
                steps, values = series.setdefault(key.removeprefix("eval/"), ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    return series


def _draw_loss(
    axes: Axes, rows: Sequence[Mapping[str, Any]], held_out: Mapping[str, tuple[list[int], list[float]]]
) -> None:
    steps = np.array([row["step"] for row in rows])
    loss = np.array([float(row["loss"]) for row in rows])
    finite = np.isfinite(loss)
    noisy = len(rows) > 40
    axes.plot(steps[finite], loss[finite], color=COLOURS[0], lw=0.8 if noisy else 1.8, alpha=0.35 if noisy else 1)
    if noisy:
        window = max(len(rows) // 40, 5)
        axes.plot(steps[finite], _running_mean(loss[finite], window), color=COLOURS[0], lw=2, label="training")
    else:
        axes.lines[0].set_label("training")
    for colour, (name, (at, values)) in zip(COLOURS[1:], held_out.items()):
        axes.plot(at, values, color=colour, lw=1.8, marker="o", ms=3.5, label=f"held-out {_title(name)}")
    for step in steps[~finite]:
        axes.axvline(step, color=WRONG, lw=0.8, label="not finite" if step == steps[~finite][0] else None)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=9)
    _style(axes, "Loss")


def _draw_rate(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    with_rate = [row for row in rows if row.get("lr") is not None]
    steps, rates = [row["step"] for row in with_rate], [row["lr"] for row in with_rate]
    axes.fill_between(steps, rates, color=FAINT, alpha=0.25, lw=0)
    axes.plot(steps, rates, color=FAINT, lw=1.4)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    _style(axes, "Learning rate")
    axes.title.set_fontsize(9)
    axes.set_xlabel("step", color=FAINT)


def _draw_accuracies(axes: Axes, series: Mapping[str, tuple[list[int], list[float]]]) -> None:
    names = sorted((n for n in series if "chance" not in n), key=lambda n: -series[n][1][-1])
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for name in names:
        steps, values = series[name]
        label = f"{_title(name)}  {shown(name, values[-1])}"
        axes.plot(steps, values, color=colours[name], lw=1.8, marker="o", ms=3.5, label=label)
    for name, (steps, values) in series.items():
        if "chance" in name:
            owner = name.replace("_chance", "").replace("chance_", "")
            axes.plot(steps, values, color=colours.get(owner, FAINT), lw=1.1, ls=(0, (4, 3)))
    if len(names) < len(series):
        axes.plot([], [], color=FAINT, lw=1.1, ls=(0, (4, 3)), label="chance")
    axes.set_ylim(0, 1.02)
    if all(map(is_share, series)):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("step", color=FAINT)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    _style(axes, "Held-out accuracy" if all(map(is_share, series)) else "Held-out figures")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` values around each, over fewer at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    starts, ends = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (total[ends] - total[starts]) / (ends - starts)


def _title(name: str) -> str:
    return name.replace("_", " ").replace("/", " ")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.grid(axis="y", color="#e6e9ec", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c3c9cf")
    axes.tick_params(colors=FAINT, length=0, labelsize=9)
