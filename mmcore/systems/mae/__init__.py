"""MAE, masked autoencoders (arXiv 2111.06377)."""

RECIPES = {"mae": "recipe:Mae"}
FOLDERS = {"vit_mae": "weights:load_mae"}
FILES = {"mae": "weights:published_encoder"}
PROOFS = {"mae": "recipe:PROOF"}
