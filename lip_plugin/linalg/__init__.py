"""Batched matrix tools: proven norms, orthogonalization, and projections onto a cap."""
