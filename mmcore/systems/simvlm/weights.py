"""SimVLM's weights and settings; no others have been published, so the names are its own."""

from mmcore.parts.text import TextConfig
from mmcore.parts.vit import VisionConfig
from mmcore.systems.simvlm.model import SimVLM, SimVLMConfig
from mmcore.weights.folder import ModelFolder
from mmcore.weights.layout import Layout
from mmcore.weights.settings import Key, Settings, section, transformers_keys

_BLOCK = {"num_layers": 12, "num_heads": 12, "mlp_dim": 3072, "activation": "gelu", "norm_eps": 1e-5}
_PARTS = ("stem", "image_position", "token_embedding", "position_embedding", "transformer", "norm_prefix", "decoder")
SETTINGS = Settings(
    {
        **section("vision", "vision_config", transformers_keys(image_size=224, patch_size=16, width=768, **_BLOCK)),
        **section("text", "text_config", transformers_keys(vocab_size=30522, context_length=256, width=768, **_BLOCK)),
        "has_decoder": Key("has_decoder", True),
    },
    kind=SimVLMConfig,
    kinds={"vision": VisionConfig, "text": TextConfig},
    model_types=("simvlm",),
    written={"architectures": ["SimVLM"], "model_type": "simvlm", "dtype": "float32"},
)
LAYOUT = Layout(
    {name: name for name in (*_PARTS, "head.norm")},
    tied={"head.weight": "token_embedding.weight"},
    what="a file of a SimVLM",
)
FOLDER = ModelFolder("simvlm", SimVLM, SETTINGS, LAYOUT)
load_simvlm, save_simvlm = FOLDER.load, FOLDER.save
