"""Other libraries made to run on our operations; each module is imported by who wants it, and imports its library."""
