"""Systems: a folder each, found by itself."""
