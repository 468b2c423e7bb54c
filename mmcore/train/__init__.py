"""The training core: DeepSpeed as the engine, exact losses across ranks, exact resume."""

import os

import torch

# DeepSpeed chooses its accelerator when it is imported, and warns at length where it has to guess.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
