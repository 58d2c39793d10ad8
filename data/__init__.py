"""The tiny world, its base model, the rivals and the evidence."""
