"""MoCo v1 and v2: a view picks the key of another among a queue of earlier keys (arXiv 1911.05722, 2003.04297)."""

RECIPES = {"moco": "recipe:MoCo"}
PROOFS = {"moco": "recipe:PROOF"}
