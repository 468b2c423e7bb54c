"""The `mmcore` command in processes of its own and in this one, and the small parts that runs start from."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mmcore.errors import complain
from mmcore.launch import parse
from mmcore.parts.language import tiny_language_model, tiny_tokenizer
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmcore.systems.clip.weights import save_clip
from mmcore.train.trainer import _prepare
from tests.distributed.launch import environment
from tests.processes import ROOT, TIMEOUT_S, run_main

MMCORE = [sys.executable, "-c", "from mmcore.cli import main; main()"]


def run(*arguments: object, launcher: list[str] | None = None, code: int = 0) -> subprocess.CompletedProcess:
    words = [str(x) for x in arguments]
    if launcher is None:
        [done] = run_main("mmcore", words, env=[environment()])
    else:
        command = [*launcher, *words]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def begin(name: str, *arguments: str) -> None:
    """What rank 0 of `mmcore train` does before anything is written, in this process; a mistake ends it with 2."""
    try:
        recipe = parse(name, list(arguments), f"mmcore train {name}")
        _prepare(name, recipe, recipe.open_data(), 1)
    except (ValueError, OSError) as error:
        raise SystemExit(complain(error, 2)) from error


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records}


def write_tower(folder: Path) -> Path:
    """A CLIP of random weights."""
    torch.manual_seed(0)
    save_clip(CLIP(CLIP_CONFIGS["tiny"]), folder)
    return folder


def write_language(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A language model of random weights, and its tokenizer."""
    torch.manual_seed(1)
    texts = ["a scan of the digit seven\n", "Question: which digit is this? Answer: two\n"]
    tokenizer = tiny_tokenizer([*texts, *["USER: which digit is written here? ASSISTANT: seven"] * 4])
    model: Any = tiny_language_model(tokenizer)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
