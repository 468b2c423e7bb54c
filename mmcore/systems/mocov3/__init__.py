"""MoCo v3: a ViT's two views pick each other's key among all others of the batch (arXiv 2104.02057)."""

RECIPES = {"mocov3": "recipe:MoCoV3"}
PROOFS = {"mocov3": "recipe:PROOF"}
