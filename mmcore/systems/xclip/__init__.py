"""xCLIP: CLIP and its non-contrastive twin, which assigns pairs to clusters (arXiv 2210.09304)."""

RECIPES = {"xclip": "recipe:XClip"}
PROOFS = {"xclip": "recipe:PROOF", "xclip-collapse": "recipe:COLLAPSE"}
