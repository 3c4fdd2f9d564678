"""Hugging Face Transformers: families, the Trainer's callback, saving and loading."""
