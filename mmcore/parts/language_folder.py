"""The language model of a run: one in a folder, known by its files' hashes, or a tiny one that was trained first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from mmcore.parts.language import dtypes_of, fingerprint, load_language_model, load_language_tokenizer
from mmcore.parts.tiny_lm import STEPS, Said, train_tiny_lm
from mmcore.weights.files import LOCAL

LANGUAGE_MODEL = "language_model"
"""Of a run's folder, the folder of a language model that it trained for itself; of its config.json, what it knows of
its language model."""
TINY = "tiny"
Partition = Callable[[Any, Callable[[Tensor], torch.dtype]], None]
"""Splits a model's weights among ranks, each in the dtype that the function says; see `mmcore.recipe.Assets`."""


@dataclass(frozen=True)
class Language:
    """A language model of transformers, frozen or not."""

    tokenizer: Any
    folder: Path | None  # None = it was trained here, and no run's folder has it yet
    model: Any | None = None  # None = `load` reads it
    dtype: torch.dtype | None = None  # of what `load` reads; None = as it is stored

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it is of T5's kind."""
        if self.model is not None:
            return self.model.config.is_encoder_decoder
        assert self.folder is not None
        config = AutoConfig.from_pretrained(self.folder, **LOCAL)
        return config.get_text_config().is_encoder_decoder

    @property
    def summary(self) -> str:
        """For the reader."""
        return f"{len(self.tokenizer)} tokens, of {self.folder or 'the texts of --data'}"

    def load(self, partition: Partition | None = None) -> Any:
        """The model, in evaluation mode on the CPU, or, split among ranks, where `partition` puts it; errors as of
        `load_language_model`."""
        if self.model is not None:
            return self.model
        assert self.folder is not None
        if partition is None:
            return load_language_model(self.folder, dtype=self.dtype)
        model = load_language_model(self.folder, dtype=None)
        partition(model, dtypes_of(model, self.dtype or model.dtype))
        return model

    def save(self, run: Path) -> dict[str, Any]:
        """Writes one that was trained here into a run's folder; what the run's config.json knows of it."""
        if self.folder is None:
            assert self.model is not None
            self.model.save_pretrained(run / LANGUAGE_MODEL)
            self.tokenizer.save_pretrained(run / LANGUAGE_MODEL)
        files = fingerprint(self.folder or run / LANGUAGE_MODEL)
        return {"folder": LANGUAGE_MODEL if self.folder is None else str(self.folder), "files": files}


def check_llm_steps(llm: str | None, steps: int | None) -> None:
    """Raises a ValueError for steps where nothing is trained."""
    if steps is not None and (llm != TINY or steps < 1):
        raise ValueError(f"--llm-steps must be at least 1 and beside --llm {TINY}, got {steps}")


def read_language(folder: Path) -> Language:
    """One in a folder; errors as of `load_language_tokenizer`."""
    return Language(load_language_tokenizer(folder), folder.resolve())


def chosen_language(
    llm: str, said: Callable[[], Sequence[Sequence[Said]]], *, seed: int, steps: int | None
) -> Language:
    """What --llm names: one in a folder, or a tiny one, trained on what is said of each picture, which is told."""
    if llm != TINY:
        return read_language(Path(llm))
    texts = said()
    model, tokenizer, loss = train_tiny_lm(texts, seed=seed, steps=steps or STEPS)
    size, count = sum(p.numel() for p in model.parameters()) / 1e6, sum(map(len, texts))
    print(f"a tiny language model ({size:.1f} M parameters) learned {count} texts to a loss of {loss:.2f}")
    return Language(tokenizer, None, model)


def language_of(
    run: Path, saved: Mapping[str, Any], moved_to: Path | None, dtype: torch.dtype | None, *, verify: bool = True
) -> Language:
    """The language model of a run's folder, where it was or is now; a ValueError where it is gone, or, with `verify`,
    where its files are not those it was trained with. `saved` is "model" of the run's config.json."""
    known = saved[LANGUAGE_MODEL]
    folder = run / known["folder"] if moved_to is None else moved_to
    if not folder.is_dir():
        raise ValueError(f"the language model of {run} must be in {folder}, which is gone: say where by --llm")
    files = fingerprint(folder) if verify else known["files"]
    differ = sorted(n for n in known["files"].keys() | files.keys() if known["files"].get(n) != files.get(n))
    if differ:
        what = f"the language model of {run} must be the one it was trained with"
        raise ValueError(f"{what}, got {folder}, which differs in {', '.join(differ[:3])}")
    return Language(load_language_tokenizer(folder), folder, dtype=dtype)
