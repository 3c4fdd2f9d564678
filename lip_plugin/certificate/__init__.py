"""Proofs about a model: an executable graph, upper bounds from it, and attacks on them from below."""
