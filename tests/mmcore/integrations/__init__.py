"""Our operations inside other libraries."""
