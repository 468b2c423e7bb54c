"""All that a GPU is wanted for, in an order that says the most in a few minutes: `python -m bench.gpu`."""
