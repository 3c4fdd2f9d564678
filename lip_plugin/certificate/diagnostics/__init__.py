"""Proven facts besides the Lipschitz constant: rounding of the forward pass, ranges of activations."""
