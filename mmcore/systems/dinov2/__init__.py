"""DINOv2: DINO and iBOT with even assignments, spread features and registers (arXiv 2304.07193, 2309.16588)."""

RECIPES = {"dinov2": "recipe:Dinov2"}
FOLDERS = {"dinov2": "weights:load_dinov2", "dinov2_with_registers": "weights:load_dinov2"}
PROOFS = {"dinov2": "recipe:PROOF"}
