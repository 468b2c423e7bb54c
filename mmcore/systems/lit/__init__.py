"""LiT, locked-image tuning (arXiv 2111.07991)."""

RECIPES = {"lit": "recipe:Lit"}
PLANS = {"lit": "plan:LitPlan"}
PROOFS = {"lit": "recipe:PROOF"}
