"""Curves and sheets of pictures as PNG."""
