"""LXMERT (arXiv 1908.07490): words and regions apart, then reading each other."""

RECIPES = {"lxmert": "recipe:Lxmert", "lxmert-vqa": "answers:LxmertVqa"}
FOLDERS = {"lxmert": "weights:load_lxmert"}
PROOFS = {"lxmert": "recipe:PROOF", "lxmert-vqa": "answers:PROOF", "lxmert-matching": "answers:MATCHING"}
