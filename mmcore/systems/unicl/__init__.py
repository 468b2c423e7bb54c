"""UniCL (arXiv 2204.03610): contrast in the space of images, texts and labels."""

RECIPES = {"unicl": "recipe:Unicl"}
PROOFS = {"unicl": "recipe:PROOF"}
