"""ViT, an image tower of its own (arXiv 2010.11929)."""

FOLDERS = {"vit": "weights:load_vit"}
