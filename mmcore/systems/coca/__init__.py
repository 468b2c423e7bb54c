"""CoCa: contrast and captions of one model (arXiv 2205.01917)."""

RECIPES = {"coca": "recipe:Coca"}
FOLDERS = {"coca": "weights:load_folder", "multimodal_cfg": "weights:load_folder"}
PROOFS = {"coca": "recipe:PROOF"}
