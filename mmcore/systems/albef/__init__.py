"""ALBEF: towers aligned by contrast with a momentum model, then fused: matching and masked words (arXiv 2107.07651)."""

RECIPES = {"albef": "recipe:Albef", "albef-vqa": "vqa:AlbefVqa"}
FOLDERS = {"albef": "weights:load_albef", "albef-vqa": "vqa:load_albef_vqa"}
PLANS = {"albef": "plan:AlbefPlan", "albef-vqa": "plan:AlbefVqaPlan"}
PROOFS = {"albef": "recipe:PROOF", "albef-matching": "recipe:PROOF_MATCHING", "albef-vqa": "vqa:PROOF"}
