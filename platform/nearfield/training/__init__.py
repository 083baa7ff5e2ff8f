"""Training: for now, how the built-in quickstart model is made."""
