"""ViLT (arXiv 2102.03334): one transformer over words and patches."""

RECIPES = {"vilt": "recipe:Vilt", "vilt-vqa": "answers:ViltVqa", "vilt-nlvr2": "reasoning:ViltNlvr2"}
FOLDERS = {"vilt": "weights:load_vilt"}
PROOFS = {"vilt": "recipe:PROOF", "vilt-vqa": "answers:PROOF", "vilt-nlvr2": "reasoning:PROOF"}
