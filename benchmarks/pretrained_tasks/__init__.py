"""What benchmarks/pretrained.py compares: tasks with models that were trained, and ways to take their norms."""
