"""SigLIP 2 (arXiv 2502.14786): images of any shape (NaFlex), and a captioning decoder beside the sigmoid loss."""

RECIPES = {"siglip2": "recipe:Siglip2"}
PROOFS = {"siglip2": "recipe:PROOF"}
