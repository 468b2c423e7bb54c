"""ViT, image classification and an image tower of its own (arXiv 2010.11929)."""

RECIPES = {"vit": "recipe:Vit"}
FOLDERS = {"vit": "weights:load_vit"}
PROOFS = {"vit": "recipe:PROOF", "vit-distillation": "recipe:DISTILLATION"}
