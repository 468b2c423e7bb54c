"""FLIP (arXiv 2212.00794): CLIP that reads a part of each image, and all of it at the end."""

RECIPES = {"flip": "recipe:Flip"}
PROOFS = {"flip": "recipe:PROOF"}
