"""SimVLM: one loss, of the words behind a prefix of image and text (arXiv 2108.10904)."""

RECIPES = {"simvlm": "recipe:Simvlm", "simvlm-vqa": "recipe:SimvlmVqa"}
FOLDERS = {"simvlm": "weights:load_simvlm"}
PROOFS = {"simvlm": "recipe:PROOF", "simvlm-vqa": "recipe:PROOF_VQA"}
