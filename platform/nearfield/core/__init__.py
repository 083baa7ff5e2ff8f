"""What every other package may rely on: errors, the model spec, ids. No Ray, no I/O."""
