"""MAE's weights and settings as transformers' ViTMAEForPreTraining has them in its files."""

from mmcore.parts.vit import mae_vision
from mmcore.parts.vit_names import VIT_BLOCK, VIT_SETTINGS, VIT_TOWER
from mmcore.systems.mae.model import MAE, MAEConfig
from mmcore.weights.folder import ModelFolder
from mmcore.weights.layout import Layout, leading, under
from mmcore.weights.settings import Key, Settings

LAYOUT = Layout(
    {
        **under("visual", "vit", VIT_TOWER),
        "decoder.mask_token": leading("decoder.mask_token", 2),
        "decoder.position_embedding": leading("decoder.decoder_pos_embed", 1),
        "decoder.embed": "decoder.decoder_embed",
        **under("decoder.transformer.blocks.{i}", "decoder.decoder_encoder.layer.{i}", VIT_BLOCK),
        "decoder.norm": "decoder.decoder_norm",
        "decoder.head": "decoder.decoder_pred",
    }
)
SETTINGS = Settings(
    {
        **{f"vision.{name}": key for name, key in VIT_SETTINGS.items()},
        "decoder_width": Key("decoder_hidden_size", 512),
        "decoder_layers": Key("decoder_num_hidden_layers", 8),
        "decoder_heads": Key("decoder_num_attention_heads", 16),
        "decoder_mlp_dim": Key("decoder_intermediate_size", 2048),
        "mask_ratio": Key("mask_ratio", 0.75),
        "norm_pix": Key("norm_pix_loss", False),
    },
    kind=MAEConfig,
    kinds={"vision": mae_vision},
    model_types=("vit_mae",),
    must={"qkv_bias": True, "num_channels": 3, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    written={"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "dtype": "float32"},
)
FOLDER = ModelFolder("mae", MAE, SETTINGS, LAYOUT)
load_mae, save_mae = FOLDER.load, FOLDER.save
