"""Whole tensors out of pieces, and back: the only room that talks to other processes."""
