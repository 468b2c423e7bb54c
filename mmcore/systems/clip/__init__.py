"""CLIP (arXiv 2103.00020)."""

RECIPES = {"clip": "recipe:Clip"}
FOLDERS = {"clip": "weights:load_folder"}
PLANS = {"clip": "plan:ClipPlan"}
PROOFS = {"clip": "recipe:PROOF", "emoji": "recipe:EMOJI", "clip-from-tower": "recipe:FROM_TOWER"}
