"""FLIP (arXiv 2212.00794): CLIP that reads a part of each image, and all of it at the end."""

RECIPES = {"flip": "recipe:Flip"}
PLANS = {"flip": "plan:FlipPlan"}
PROOFS = {"flip": "recipe:PROOF"}
