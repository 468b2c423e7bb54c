"""BYOL: one view predicts what a moving average of the model makes of the other (arXiv 2006.07733)."""

RECIPES = {"byol": "recipe:BYOL"}
PROOFS = {"byol": "recipe:PROOF"}
