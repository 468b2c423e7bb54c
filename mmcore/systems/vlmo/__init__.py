"""VLMo: experts of images, of texts and of both in one transformer, in three stages (arXiv 2111.02358)."""

RECIPES = {"vlmo": "recipe:Vlmo", "vlmo-text": "recipe:VlmoText", "vlmo-vqa": "vqa:VlmoVqa"}
FOLDERS = {"vlmo": "weights:load_vlmo"}
PLANS = {"vlmo": "plan:VlmoPlan", "vlmo-text": "plan:VlmoTextPlan", "vlmo-vqa": "plan:VlmoVqaPlan"}
PROOFS = {"vlmo": "recipe:PROOF", "vlmo-text": "recipe:TEXT_PROOF", "vlmo-vqa": "vqa:PROOF"}
