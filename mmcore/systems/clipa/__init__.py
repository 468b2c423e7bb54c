"""CLIPA (arXiv 2305.07017): CLIP on smaller pictures and shorter captions, and on whole ones at the end."""

RECIPES = {"clipa": "recipe:Clipa"}
PROOFS = {"clipa": "recipe:PROOF"}
