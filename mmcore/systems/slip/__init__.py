"""SLIP: CLIP and SimCLR on one image tower (arXiv 2112.12750)."""

RECIPES = {"slip": "recipe:Slip"}
PROOFS = {"slip": "recipe:PROOF"}
