"""Bounds on what happens inside a model: activations, attention entropies, rounding."""
