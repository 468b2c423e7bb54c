"""iBOT: DINO, and masked patches that are told by the same teacher (arXiv 2111.07832)."""

RECIPES = {"ibot": "recipe:Ibot"}
PROOFS = {"ibot": "recipe:PROOF"}
