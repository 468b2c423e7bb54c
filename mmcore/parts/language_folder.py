"""Where the language model of a run lies: in the run's folder, or in one that is known by its files' hashes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcore.parts.language import fingerprint

LANGUAGE_MODEL = "language_model"
"""Folder of a language model that a run trained for itself."""


def language_model_folder(folder: Path, saved: Mapping[str, Any], moved_to: Path | None = None) -> Path:
    """Where the frozen language model of a run of stage 2 is, its files compared with those it was trained with.

    Args:
        folder: the run's.
        saved: "model" of its config.json.
        moved_to: where it is now; None = where it was.

    Raises:
        ValueError: it is gone, or changed.
    """
    known = saved[LANGUAGE_MODEL]
    found = folder / known["folder"] if moved_to is None else moved_to
    if not found.is_dir():
        raise ValueError(
            f"the language model of {folder} must be in {found}, which is gone: say where by --llm"
        )
    files = fingerprint(found)
    differ = sorted(n for n in known["files"].keys() | files.keys() if known["files"].get(n) != files.get(n))
    if differ:
        raise ValueError(
            f"the language model of {folder} must be the one it was trained with, got {found}, "
            f"which differs in {', '.join(differ[:3])}"
        )
    return found
