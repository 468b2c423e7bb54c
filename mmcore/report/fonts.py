"""Captions in any script on a matplotlib figure: a font that has the characters, or their code points."""

import unicodedata
from functools import lru_cache
from pathlib import Path

from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font

BASE_FONT = "DejaVu Sans"


@lru_cache(maxsize=64)
def _codepoints(path: str) -> frozenset[int]:
    return frozenset(FT2Font(path).get_charmap())


def _faces() -> dict[str, str]:
    """Family name to file of every upright regular font; matplotlib's own font of boxes is not one."""
    faces: dict[str, str] = {}
    for entry in fontManager.ttflist:
        if "Last Resort" not in entry.name and entry.style == "normal" and Path(entry.fname).is_file():
            faces.setdefault(entry.name, entry.fname)
    return faces


def _drawable(text: str, families: list[str]) -> set[str]:
    faces = _faces()
    have = frozenset().union(*(_codepoints(faces[name]) for name in families))
    return {c for c in text if ord(c) in have or c.isspace()}


def families_for(texts: list[str]) -> list[str]:
    """matplotlib's own font, and the installed one that has most of the characters which it lacks, if any."""
    text = "".join(texts)
    missing = set(text) - _drawable(text, [BASE_FONT])
    if not missing:
        return [BASE_FONT]
    faces = {name: path for name, path in _faces().items() if name != BASE_FONT}
    counts = {name: sum(ord(c) in _codepoints(path) for c in missing) for name, path in faces.items()}
    best = max(counts, key=lambda name: (counts[name], name), default=None)
    return [BASE_FONT] if best is None or not counts[best] else [BASE_FONT, best]


def escape_undrawable(text: str, families: list[str]) -> tuple[str, bool]:
    """`text` with characters that the fonts lack as code points, such as U+732B; whether it has any."""
    text = "".join(" " if c.isspace() else c for c in text)
    drawable = _drawable(text, families)
    shown = "".join(c if c in drawable else f" U+{ord(c):04X} " for c in text)
    return " ".join(shown.split()), not set(text) <= drawable


def wrap(text: str, width: int, max_lines: int) -> str:
    """Break `text` into lines of `width` columns, wide characters counting two; the rest is cut to '…'."""
    lines: list[str] = [""]
    for part in (piece for whole in _parts(text) for piece in _pieces(whole, width)):
        if _columns(lines[-1] + part.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += part if lines[-1] else part.lstrip()
    lines = [line.rstrip() for line in lines]
    if len(lines) > max_lines:
        while _columns(lines[max_lines - 1]) >= width:
            lines[max_lines - 1] = lines[max_lines - 1][:-1]
        lines[max_lines - 1] += "…"
    return "\n".join(lines[:max_lines])


def _pieces(part: str, width: int) -> list[str]:
    """A word longer than a line, in pieces that fit one."""
    pieces = [""]
    for c in part:
        if pieces[-1] and _columns((pieces[-1] + c).strip()) > width:
            pieces.append("")
        pieces[-1] += c
    return pieces


def _is_wide(c: str) -> bool:
    return unicodedata.east_asian_width(c) in "WF"


def _columns(text: str) -> int:
    return sum(2 if _is_wide(c) else 1 for c in text)


def _parts(text: str) -> list[str]:
    """Where a line may break: before a space, around a wide character, but not before closing punctuation."""
    parts: list[str] = []
    for c in text:
        if parts and _is_wide(c) and unicodedata.category(c) in ("Po", "Pe", "Pf"):
            parts[-1] += c
        elif not parts or c == " " or _is_wide(c) or _is_wide(parts[-1][-1]):
            parts.append(c)
        else:
            parts[-1] += c
    return parts
