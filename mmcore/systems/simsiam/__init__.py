"""SimSiam: one view predicts the other, which gets no gradient (arXiv 2011.10566)."""

RECIPES = {"simsiam": "recipe:SimSiam"}
PROOFS = {"simsiam": "recipe:PROOF"}
