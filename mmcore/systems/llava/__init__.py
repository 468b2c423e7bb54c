"""LLaVA, 1.5 and NeXT (arXiv 2304.08485, 2310.03744): an image tower's patches as tokens of a language model."""

RECIPES = {"llava-stage1": "recipe:LlavaStage1", "llava-stage2": "recipe:LlavaStage2"}
FOLDERS = {"llava": "weights:read_llava", "llava_next": "weights:read_llava"}
CHATS = {"llava": "talk:model_of_folder", "llava_next": "talk:model_of_folder"}
PLANS = {"llava-stage1": "plan:Stage1Plan", "llava-stage2": "plan:Stage2Plan", "llava": "plan:Stage2Plan"}
PROOFS = {"llava-stage1": "recipe:PROOF1", "llava-stage2": "recipe:PROOF2"}
