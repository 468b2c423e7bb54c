"""DINO: a student's views agree with those of a momentum teacher (arXiv 2104.14294)."""

RECIPES = {"dino": "recipe:Dino"}
PROOFS = {"dino": "recipe:PROOF"}
