"""The language model of a run: one in a folder, or a tiny one that is trained first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmcore.parts.language import fingerprint, load_language_model, load_language_tokenizer
from mmcore.parts.language_folder import LANGUAGE_MODEL
from mmcore.parts.tiny_lm import STEPS, Said, train_tiny_lm

TINY = "tiny"


@dataclass(frozen=True)
class Language:
    """A language model before the run has a folder.

    Args:
        model: of transformers, float32.
        tokenizer: its own.
        folder: where it lies; None = it was trained here.
    """

    model: Any
    tokenizer: Any
    folder: Path | None

    def save(self, run: Path) -> dict[str, Any]:
        """Writes one that was trained here into a run's folder; what that knows of it."""
        if self.folder is None:
            self.model.save_pretrained(run / LANGUAGE_MODEL)
            self.tokenizer.save_pretrained(run / LANGUAGE_MODEL)
        files = fingerprint(self.folder or run / LANGUAGE_MODEL)
        return {"folder": LANGUAGE_MODEL if self.folder is None else str(self.folder), "files": files}


def check_llm_steps(llm: str | None, steps: int | None) -> None:
    """Raises a ValueError for steps where nothing is trained."""
    if steps is not None and (llm != TINY or steps < 1):
        raise ValueError(f"--llm-steps must be at least 1 and beside --llm {TINY}, got {steps}")


def read_language(folder: Path) -> Language:
    """One in a folder.

    Raises:
        ValueError: see `load_language_model` and `load_language_tokenizer`.
    """
    folder = folder.resolve()
    model = load_language_model(folder, dtype=torch.float32)
    return Language(model, load_language_tokenizer(folder), folder)


def tiny_language(said: Callable[[], Sequence[Sequence[Said]]], *, seed: int, steps: int | None) -> Language:
    """A tiny one, trained on what is said of each picture; says so."""
    texts = said()
    model, tokenizer, loss = train_tiny_lm(texts, seed=seed, steps=steps or STEPS)
    size, count = sum(p.numel() for p in model.parameters()) / 1e6, sum(map(len, texts))
    print(f"a tiny language model ({size:.1f} M parameters) learned {count} texts to a loss of {loss:.2f}")
    return Language(model, tokenizer, None)
