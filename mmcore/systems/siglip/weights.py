"""SigLIP's weights and settings as transformers has them: SiglipModel's, and Siglip2Model's for its square images."""

from mmcore.parts import vit_names
from mmcore.parts.vit import siglip_vision
from mmcore.systems.siglip.model import SigLIP, SigLIPConfig, text_config
from mmcore.weights.folder import ModelFolder
from mmcore.weights.layout import Layout, under
from mmcore.weights.settings import Settings, section, transformers_keys

LAYOUT = Layout(
    {
        **under("visual", "vision_model", vit_names.SIGLIP_TOWER),
        **under("text", "text_model", {**vit_names.CLIP_TEXT, "proj": "head"}),
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
    },
    unread=vit_names.POSITION_IDS,
)
_TEXT = transformers_keys(vocab_size=32000, context_length=64) | vit_names.SIGLIP_BLOCK_SETTINGS
SETTINGS = Settings(
    {**section("vision", "vision_config", vit_names.SIGLIP_TOWER_SETTINGS), **section("text", "text_config", _TEXT)},
    kind=SigLIPConfig,
    kinds={"vision": siglip_vision, "text": text_config},
    model_types=("siglip", "siglip2"),
    must={"vision_config.num_channels": 3, "vision_config.vision_use_head": True}
    | {f"{x}_config.attention_dropout": 0 for x in ("vision", "text")},
    written={
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "dtype": "float32",
        "vision_config.model_type": "siglip_vision_model",
        "text_config.model_type": "siglip_text_model",
        "text_config.projection_size": lambda ours: ours["vision.width"],
    },
    current=vit_names.with_image_size,
)
FOLDER = ModelFolder("siglip", SigLIP, SETTINGS, LAYOUT)
load_siglip, save_siglip = FOLDER.load, FOLDER.save
