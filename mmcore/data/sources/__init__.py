"""Where images, captions, questions and conversations come from."""
