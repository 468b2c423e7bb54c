"""BLIP-2 (arXiv 2301.12597): a Q-Former trained by contrast, matching and captions, then before a language model."""

RECIPES = {"blip2-stage1": "recipe:Blip2Stage1", "blip2-stage2": "recipe:Blip2Stage2"}
FOLDERS = {"blip-2": "weights:load_folder"}
TOWERS = {"blip-2": "weights:load_blip2_tower"}
PLANS = {"blip2-stage1": "plan:Stage1Plan", "blip2-stage2": "plan:Stage2Plan", "blip2": "plan:Stage1Plan"}
PROOFS = {"blip2-stage1": "recipe:PROOF1", "blip2-stage2": "recipe:PROOF2"}
