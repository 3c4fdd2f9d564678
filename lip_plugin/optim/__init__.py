"""Optimizers that keep the caps: LipschitzMuon, and a projection for any other optimizer."""
