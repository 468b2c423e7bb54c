"""`mmcore plan` beside what others published and what this machine measured: the tables of docs/plan.md and
docs/scale.md. `python -m bench.published` writes them anew."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmcore.plan.exchange import loss
from mmcore.plan.hardware import GPUS, Gpu
from mmcore.plan.job import Exchange, Job, Setting
from mmcore.plan.memory import fits, peak, phases
from mmcore.plan.report import changes, plan
from mmcore.plan.step import step
from mmcore.systems.blip2.plan import blip2_stage1_job
from mmcore.systems.clip.plan import clip_job
from mmcore.systems.llava.plan import llava_job

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu-2core"
PAGES = (ROOT / "docs" / "plan.md", ROOT / "docs" / "scale.md")

# Inf-CL, arXiv:2410.17243: memory of the loss on each of 8 A800, ViT-L/14, GB, by global batch; None = out of memory.
INF_CL: dict[int, tuple[float, float | None]] = {32_768: (0.18, 2.27), 262_144: (1.45, None), 1_048_576: (6.53, None)}
INF_CL_RANKS, INF_CL_WIDTH = 8, 768


class Run(NamedTuple):
    """A run of open_clip."""

    model: str
    gpus: int
    per_gpu: int
    samples_per_s: float


# github.com/LAION-AI/scaling-laws-openclip, trained_models_info.csv (arXiv:2212.07143): A100 of 40 GB, 4 a node.
OPEN_CLIP = (
    Run("ViT-B-32", 128, 256, 108844.5704),
    Run("ViT-B-32", 344, 256, 219759.0125),
    Run("ViT-B-16", 344, 256, 136370.9084),
    Run("ViT-L-14", 396, 224, 40026.59493),
    Run("ViT-L-14", 200, 448, 35524.82252),
)


def eager_loss_bytes(rows: int, ranks: int, width: int) -> float:
    """Of open_clip's loss with gathered features: logits of both directions and their gradients, float32, and the
    gathered features of both sides."""
    columns = rows * ranks
    return 4 * (4 * rows * columns + 2 * columns * width)


def inf_cl_table() -> list[Sequence[str]]:
    memory = GPUS["a800"].memory_bytes
    rows: list[Sequence[str]] = [
        ("global batch", "Inf-CL, published", "ours: ring", "gathered", "taken", "OpenCLIP, published", "by formula")
    ]
    for batch, (theirs, open_clip) in INF_CL.items():
        own = batch // INF_CL_RANKS
        exchange = Exchange(INF_CL_WIDTH)
        ring, gathered = (loss(exchange, own, INF_CL_RANKS, is_cpu=False, is_ring=is_ring) for is_ring in (True, False))
        chosen = loss(exchange, own, INF_CL_RANKS, is_cpu=False)
        eager = eager_loss_bytes(own, INF_CL_RANKS, INF_CL_WIDTH)
        rows.append(
            (
                f"{batch:,}",
                f"{theirs:.2f}",
                _gb(ring.gathered + ring.workspace),
                _gb(gathered.gathered + gathered.workspace),
                "ring" if chosen.is_ring else "gathered",
                "out of memory" if open_clip is None else f"{open_clip:.2f}",
                _gb(eager) + (", more than there is" if eager > memory else ""),
            )
        )
    return rows


def predicted(run: Run) -> tuple[Setting, float, bool]:
    """How we would run it: with activation checkpointing where it does not fit without; its samples a second on all
    GPUs, and whether it fits without."""
    job, gpu = clip_job(run.model), GPUS["a100-40gb"]
    setting = Setting(run.gpus * run.per_gpu, run.gpus, zero=1)
    is_small = fits(phases(job, setting, gpu), gpu)
    if not is_small:
        setting = Setting(run.gpus * run.per_gpu, run.gpus, zero=1, activation_checkpointing=True)
    return setting, step(job, setting, gpu).samples_per_s, is_small


def open_clip_table() -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("model", "GPUs x batch", "GB without checkpointing", "published, a GPU", "predicted, a GPU", "reached")
    ]
    gpu = GPUS["a100-40gb"]
    for run in OPEN_CLIP:
        setting, most, is_small = predicted(run)
        plain = Setting(setting.global_batch, setting.gpus, zero=1)
        need = _gb(peak(phases(clip_job(run.model), plain, gpu)).total)
        rows.append(
            (
                run.model,
                f"{run.gpus} x {run.per_gpu}",
                need if is_small else f"{need}: checkpointed",
                f"{run.samples_per_s / run.gpus:.0f}",
                f"{most / run.gpus:.0f}",
                f"{100 * run.samples_per_s / most:.0f} %",
            )
        )
    return rows


def examples_table() -> list[Sequence[str]]:
    """The commands of the page, each in a line."""
    cases: tuple[tuple[str, Job, Setting, Gpu], ...] = (
        (
            "`clip --model ViT-L-14 --global-batch 1048576 --gpus 512 --gpu h200 --zero 2`",
            clip_job("ViT-L-14"),
            Setting(1048576, 512, zero=2),
            GPUS["h200"],
        ),
        (
            "`blip2 --global-batch 1600 --gpus 16 --gpu a100-40gb`",
            blip2_stage1_job("ViT-g", 32),
            Setting(1600, 16, zero=1),
            GPUS["a100-40gb"],
        ),
        (
            "`llava --global-batch 128 --gpus 8 --gpu h200 --zero 3`",
            llava_job(2, "ViT-L-14-336", "vicuna-7b"),
            Setting(128, 8, zero=3),
            GPUS["h200"],
        ),
    )
    rows: list[Sequence[str]] = [
        ("`mmcore plan`", "peak, GB", "activations", "fits", "a step", "nearest that fits", "its peak", "its step")
    ]
    for command, job, setting, gpu in cases:
        found = plan(job, setting, gpu)
        line = [command, *_peak(found), "yes" if found.fits else "no", f"{found.step.total_s:.2f} s"]
        other = found.nearest
        if other is None:
            rows.append((*line, "", "", ""))
            continue
        flags = " ".join(
            flag if value is True else f"{flag} {value}" for flag, value in changes(setting, other.setting).items()
        )
        rows.append((*line, f"`{flags}`", _peak(other)[0], f"{other.step.total_s:.2f} s"))
    return rows


def _peak(found: Any) -> tuple[str, str]:
    highest = peak(found.phases)
    return _gb(highest.total), _gb(highest.parts["activations"])


def gpus_table() -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("GPU", "memory GB", "bf16 TFLOP/s", "fp32 TFLOP/s", "copy TB/s", "Texp/s", "NVLink GB/s", "network GB/s")
    ]
    for gpu in GPUS.values():
        rates = (
            (gpu.bf16_flops, 1e12),
            (gpu.fp32_flops, 1e12),
            (gpu.copy_bytes, 1e12),
            (gpu.exps, 1e12),
            (gpu.link_bytes, 1e9),
            (gpu.network_bytes, 1e9),
        )
        cells = (f"{rate.per_s / unit:.3g} ({rate.source})" for rate, unit in rates)
        rows.append((gpu.name, f"{gpu.memory_bytes / 1e9:g}", *cells))
    return rows


def measured_table() -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("setting", "parameters", "predicted MB", "at the", "measured MB", "predicted / measured")
    ]
    for name, case in json.loads((RESULTS / "plan.json").read_text())["cases"].items():
        rows.append(
            (
                name,
                f"{case['parameters'] / 1e6:.1f} M",
                f"{case['predicted_bytes'] / 1e6:.0f}",
                case["peak"],
                f"{case['measured_bytes'] / 1e6:.0f}",
                f"{case['predicted_bytes'] / case['measured_bytes']:.3f}",
            )
        )
    return rows


def scale_table() -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("ranks", "features", "error of the loss", "of dA", "of dB", "of the scale's", "sent by a rank", "planned")
    ]
    for case in json.loads((RESULTS / "scale.json").read_text())["simulated"]:
        errors = (f"{case['errors'][name]:.0e}" for name in ("loss", "da", "db", "dscale"))
        sizes = (f"{case[name]:,.0f} B" for name in ("sent_bytes", "planned_sent_bytes"))
        rows.append((str(case["ranks"]), case["how"], *errors, *sizes))
    return rows


def scale_memory_table() -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("ranks", "features", "measured MB", "planned MB")]
    for case in json.loads((RESULTS / "scale.json").read_text())["one"]:
        sizes = (f"{case[name] / 1e6:.1f}" for name in ("measured_bytes", "planned_bytes"))
        rows.append((str(case["ranks"]), case["how"], *sizes))
    return rows


TABLES: dict[str, Callable[[], list[Sequence[str]]]] = {
    "inf-cl": inf_cl_table,
    "open_clip": open_clip_table,
    "examples": examples_table,
    "gpus": gpus_table,
    "measured": measured_table,
    "scale": scale_table,
    "scale-memory": scale_memory_table,
}
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(\n?<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """A page with each `<!-- table: NAME -->` made anew."""

    def table(found: re.Match[str]) -> str:
        head, *rows = TABLES[found[2]]()
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{found[1]}{body}\n<!-- end -->"

    return TABLE.sub(table, page)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 100e9 else f"{size / 1e9:.0f}"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text()))
