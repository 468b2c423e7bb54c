"""FILIP: CLIP by late interaction of patches and words (arXiv 2111.07783)."""

RECIPES = {"filip": "recipe:Filip"}
PROOFS = {"filip": "recipe:PROOF"}
