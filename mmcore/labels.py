"""Numbers that stand in a sequence of token ids and are no token's."""

IGNORED = -100
"""Of a label: nothing is learned there, as in `linear_cross_entropy(ignore_index=)`."""
IMAGE_TOKEN = -200
"""Where a feature of an image takes the place of an embedding, as in LLaVA's own code."""
