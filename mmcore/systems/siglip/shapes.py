"""SigLIP's shapes by tower, patch and pixels, and a small one for a first run."""

from mmcore.ops import require
from mmcore.parts.text import TextConfig
from mmcore.parts.vit import VisionConfig
from mmcore.systems.siglip.model import BLOCK, VIT, SigLIPConfig

_TOWERS = {
    "tiny": {"width": 128, "num_layers": 3, "num_heads": 4, "mlp_dim": 512},
    "B": {"width": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072},
    "L": {"width": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096},
    "So400m": {"width": 1152, "num_layers": 27, "num_heads": 16, "mlp_dim": 4304},
}
_PUBLISHED = ("B-16-224", "B-16-256", "B-16-384", "B-16-512", "L-16-256", "L-16-384", "L-16-512")
NAMES = ("tiny", *_PUBLISHED, "So400m-14-224", "So400m-14-384", "So400m-16-256", "So400m-16-384", "So400m-16-512")


def siglip_config(name: str) -> SigLIPConfig:
    """The shape of a name, with the vocabulary and context of the first SigLIP.

    Raises:
        ValueError: an unknown name.
    """
    require("siglip_config", name in NAMES, "name must be one of {}, got {!r}", ", ".join(NAMES), name)
    kind, *sizes = name.split("-")
    patch, pixels = map(int, sizes or (4, 16))
    words, length = (32000, 64) if sizes else (1024, 16)
    vision = VisionConfig(pixels, patch, has_margin=pixels % patch > 0, **_TOWERS[kind], **BLOCK, **VIT)
    return SigLIPConfig(vision, TextConfig(words, length, **_TOWERS[kind], **BLOCK))
