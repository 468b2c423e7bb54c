"""ALIGN (arXiv 2102.05918)."""

RECIPES = {"align": "recipe:Align"}
FOLDERS = {"align": "weights:load_align"}
PROOFS = {"align": "recipe:PROOF"}
