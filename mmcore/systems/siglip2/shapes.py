"""SigLIP 2's shapes by tower and patch, and a small one for a first run."""

from mmcore.ops import require
from mmcore.parts.vit import siglip_vision
from mmcore.systems.siglip.model import text_config
from mmcore.systems.siglip.shapes import TOWERS
from mmcore.systems.siglip2.model import Siglip2Config

NAMES = ("tiny", "B-16", "L-16", "So400m-16")


def siglip2_config(name: str) -> Siglip2Config:
    """The shape of a name, with Gemma's vocabulary, a square of 16 x 16 positions (`tiny`: 4 x 4), and a decoder of
    half the layers of the text tower; a ValueError of an unknown one."""
    require("siglip2_config", name in NAMES, "name must be one of {}, got {!r}", ", ".join(NAMES), name)
    kind, *sizes = name.split("-")
    tower = TOWERS[kind]
    side, patch, words, length = (16, int(sizes[0]), 256_000, 64) if sizes else (4, 4, 1024, 16)
    vision = siglip_vision(side * patch, patch, *tower, interpolation="bilinear")
    return Siglip2Config(vision, text_config(words, length, *tower), side**2, tower[1] // 2)
