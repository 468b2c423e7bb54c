"""SigLIP (arXiv 2303.15343) and SigLIP 2 of fixed resolutions (arXiv 2502.14786)."""

RECIPES = {"siglip": "recipe:Siglip"}
FOLDERS = {"siglip": "weights:load_siglip", "siglip2": "weights:load_siglip"}
PROOFS = {"siglip": "recipe:PROOF"}
