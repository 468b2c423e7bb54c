"""What an image becomes."""
