"""`pytest bench/` times ops against what their users have now; `python -m bench report` turns its JSON into tables."""
