"""MAE's shapes as published, and a small one for a first run."""

from mmcore.parts.vit import mae_vision
from mmcore.systems.mae.model import MAEConfig

MAE_CONFIGS = {
    # for scikit-learn's digits, whose pixels stay as they are: many patches are blank, without variance
    "tiny": MAEConfig(mae_vision(16, 4, 64, 3, 4, 256), 64, 2, 4, 256, norm_pix=False),
    "ViT-B-16": MAEConfig(mae_vision(224, 16, 768, 12, 12, 3072)),
    "ViT-L-16": MAEConfig(mae_vision(224, 16, 1024, 24, 16, 4096)),
    "ViT-H-14": MAEConfig(mae_vision(224, 14, 1280, 32, 16, 5120)),
}
