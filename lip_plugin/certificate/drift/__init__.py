"""Bounds on how far fine-tuning can have moved a logit, and attacks on those bounds."""
