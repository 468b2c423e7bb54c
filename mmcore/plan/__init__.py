"""What a training run will take before it is started: memory, FLOP, communication and time of a step, by rank."""
