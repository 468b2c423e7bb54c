"""SimCLR: two views of an image pick each other (arXiv 2002.05709)."""

RECIPES = {"simclr": "recipe:SimCLR"}
PROOFS = {"simclr": "recipe:PROOF"}
