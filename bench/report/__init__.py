"""What is made of the JSON that `pytest bench/ --benchmark-json` writes: Markdown tables, plots and a page."""
