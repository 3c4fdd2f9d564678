"""Changes a model once: checks everything, then mutates, and remembers it."""
