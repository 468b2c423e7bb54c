"""Weights under other libraries' names, read and written as safetensors."""
