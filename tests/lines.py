"""Lines of Python by part of the house, and each system's own: `python -m tests.lines`, which `make check` prints."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = {
    "clip": 1150,
    "blip2": 1700,
    "llava": 2900,
    "siglip": 240,
    "mae": 330,
    "mim": 1900,
    "siglip2": 850,
    "filip": 140,
    "xclip": 150,
    "declip": 290,
    "slip": 280,
    "albef": 1150,
    "vlmo": 1050,
    "vlm": 1050,
    "beit3": 1050,
}
"""Own lines of a system at most."""


def count(folder: Path) -> int:
    """Lines of all Python files below a folder."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in folder.rglob("*.py"))


def own() -> dict[str, int]:
    """Of each system."""
    return {folder.parent.name: count(folder.parent) for folder in sorted(ROOT.glob("mmcore/systems/*/__init__.py"))}


if __name__ == "__main__":
    print("lines:", ", ".join(f"{name} {lines}" for name, lines in own().items()), "of their own;", end=" ")
    print(", ".join(f"{part} {count(ROOT / part)}" for part in ("kernels", "mmcore", "bench", "tests")))
