"""What the pictures of a run have in common: colours, marks of right and wrong, images, files."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mmcore.tensor_file import replacing

RIGHT, WRONG = "#1a8f4c", "#d0342c"
INK, MIDDLE, FAINT = "#22262b", "#4a5560", "#8b939c"
COLOURS = ("#2f6fb5", "#d9822b", "#1a8f4c", "#8a4fb0", "#c23b6b", "#7a5c3e", "#4a5560", "#1799a6")
FONT_NOTE = "No installed font has some of the characters: they are shown as code points (install a Noto font)."

DPI = 130


def mark(right: bool) -> str:
    return "✓" if right else "✗"


def colour_of(right: bool) -> str:
    return RIGHT if right else WRONG


def draw_image(axes: Axes, image: Any, frame: str | None) -> None:
    """A PIL image or uint8 [H, W] or [H, W, 3], with a frame of a colour or none."""
    pixels = np.asarray(image)
    axes.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if frame is not None:
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, ec=frame, lw=4, clip_on=False))


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG whole or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.18)
