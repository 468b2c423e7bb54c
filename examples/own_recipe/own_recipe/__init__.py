"""A convolution and a bag of words that meet: a system of one's own, which mmcore finds by its entry point."""

RECIPES = {"own": "recipe:Own"}
PROOFS = {"own": "recipe:PROOF"}
