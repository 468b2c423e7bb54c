"""A run's folder: made once, never overwritten, resumed only on purpose; its metrics, progress bar and settings."""

import json
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mmcore import checkpoint
from mmcore.train.config import RunConfig


@dataclass(frozen=True)
class Start:
    """Where a run begins: its folder, and the checkpoint to go on from (None = from the start)."""

    folder: Path
    checkpoint: Path | None


def open_run(recipe: str, run: RunConfig) -> Start:
    """Decides the run's folder and where to start; called by rank 0 alone, writes nothing. Raises ValueError where the
    folder exists and --resume was not given; for nothing to resume; for a damaged checkpoint."""
    if run.resume is None:
        folder = run.out or Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        if folder.exists():
            raise ValueError(f"--out must be a new folder, got {folder}, which exists; --resume latest continues it")
        return Start(folder, None)
    if run.resume == "latest":
        if run.out is None:
            raise ValueError("--resume latest must say which run: give its folder by --out")
        found = checkpoint.steps(run.out / "checkpoints")
        if not found:
            leftover = run.out / "config.json"
            if run.out.exists() and any(run.out.iterdir()) and not leftover.is_file():
                raise ValueError(f"--out must be a run to resume or a new folder, got {run.out}, which is neither")
            return Start(run.out, None)
        folder = checkpoint.step_folder(run.out / "checkpoints", found[-1])
    else:
        folder = Path(run.resume)
        if run.out is not None and run.out.resolve() != folder.resolve().parents[1]:
            raise ValueError(f"--resume {folder} belongs to the run {folder.parents[1]}, but --out is {run.out}")
    checkpoint.verify(folder)
    newest = checkpoint.step_folder(folder.parent, checkpoint.steps(folder.parent)[-1])
    if newest.name != folder.name:  # 'latest' would later mix the two continuations
        hint = "to go on from an older one, move the newer ones away"
        raise ValueError(f"--resume must be the newest checkpoint of its run, {newest}, got {folder}; {hint}")
    return Start(folder.parents[1], folder)


def peak_memory(device: torch.device) -> str:
    """Peak memory for the progress bar: of this rank's GPU, where the model is on one, or else of this process."""
    if device.type == "cuda":
        used, held = (x(device) / 2**30 for x in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
        return f"GPU {used:.1f} GB ({held:.1f} reserved)"
    status = Path("/proc/self/status")
    peaks = [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
    return f"host {int(peaks[0]) / 2**20:.1f} GB" if peaks else "host n/a"


class Metrics:
    """metrics.jsonl (always), TensorBoard (when asked) and the progress bar, on rank 0; nothing on other ranks."""

    def __init__(self, folder: Path, total: int, start: int, *, tensorboard: bool, active: bool) -> None:
        self.active, self._start, self._began = active, start, time.monotonic()
        self.records: list[dict[str, Any]] = []
        if not active:
            return
        self.path = folder / "metrics.jsonl"
        if self.path.exists():  # what came after the checkpoint will be computed again
            lines = self.path.read_text().splitlines()
            self.records = [r for r in map(_parse, lines) if r is not None and r["step"] <= start]
            checkpoint.write_file(self.path, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        self._file = self.path.open("a")
        self._board = _summary_writer(folder) if tensorboard else None
        columns = [TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[note]}")]
        columns += [TextColumn("ETA"), TimeRemainingColumn()]
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal)
        self._task: TaskID = self._bar.add_task("train", total=total, completed=start, note="")
        self._console = console
        self._bar.start()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.active:
            self._bar.stop()
            self._file.close()
            if self._board is not None:
                self._board.close()

    def log(self, step: int, values: dict[str, float], *, note: str = "") -> None:
        """Records `values` of `step` (steps done)."""
        if not self.active:
            return
        record = {"step": step, "time_s": round(time.monotonic() - self._began, 3), **values}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in values.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        if note and not self._console.is_terminal:
            self._console.print(f"step {step}/{self._bar.tasks[0].total:.0f}  {note}", highlight=False)

    def advance(self, step: int, note: str | None = None) -> None:
        """Moves the progress bar to `step`; None = it says what it said before."""
        if self.active:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            self._bar.update(self._task, completed=step, **fields)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.active:
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the last line of a killed run may be half written
        return None


def _summary_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (optional: imported only when asked for)

    return SummaryWriter(str(folder / "tensorboard"))
