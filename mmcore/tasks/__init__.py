"""What a model is measured by: each task asks it for a capability, not for its name."""
