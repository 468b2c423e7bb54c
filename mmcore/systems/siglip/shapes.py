"""SigLIP's shapes by tower, patch and pixels, and a small one for a first run."""

from mmcore.ops import require
from mmcore.parts.vit import siglip_vision
from mmcore.systems.siglip.model import SigLIPConfig, text_config

# width, layers, heads and width of the MLP, of both towers
TOWERS = {"tiny": (128, 3, 4, 512), "B": (768, 12, 12, 3072), "L": (1024, 24, 16, 4096), "So400m": (1152, 27, 16, 4304)}
_PUBLISHED = ("B-16-224", "B-16-256", "B-16-384", "B-16-512", "L-16-256", "L-16-384", "L-16-512")
NAMES = ("tiny", *_PUBLISHED, "So400m-14-224", "So400m-14-384", "So400m-16-256", "So400m-16-384", "So400m-16-512")


def siglip_config(name: str) -> SigLIPConfig:
    """The shape of a name, with the vocabulary and context of the first SigLIP; a ValueError of an unknown one."""
    require("siglip_config", name in NAMES, "name must be one of {}, got {!r}", ", ".join(NAMES), name)
    kind, *sizes = name.split("-")
    patch, pixels = map(int, sizes or (4, 16))
    words, length = (32000, 64) if sizes else (1024, 16)
    vision = siglip_vision(pixels, patch, *TOWERS[kind], has_margin=pixels % patch > 0)
    return SigLIPConfig(vision, text_config(words, length, *TOWERS[kind]))
