"""Batched matrix tools: norms with a proven side, orthogonalization, projections onto a cap."""
