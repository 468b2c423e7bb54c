"""What `mmcore eval` and the end of a training run do with a CLIP: numbers on held-out pairs, and pictures."""
