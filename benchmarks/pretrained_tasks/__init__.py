"""What benchmarks/pretrained.py compares: tasks with trained models, and ways to treat norms."""
