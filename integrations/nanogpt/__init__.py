"""nanoGPT, untouched: its train.py and sample.py under constraint."""
