"""DeCLIP: CLIP with supervision of two views, of nearest texts and of each side by itself (arXiv 2110.05208)."""

RECIPES = {"declip": "recipe:Declip"}
PROOFS = {"declip": "recipe:PROOF"}
