"""nanoGPT under constraint, with its train.py and sample.py untouched."""
