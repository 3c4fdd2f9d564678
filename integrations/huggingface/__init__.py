"""Hugging Face Transformers: families, the Trainer's callback, saving and loading."""

from lip_plugin.opening import open_house

open_house()
