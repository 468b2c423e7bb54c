"""LLaVA, 1.5 and NeXT (arXiv 2304.08485, 2310.03744)."""
