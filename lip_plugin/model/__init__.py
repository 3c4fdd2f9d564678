"""Descriptions of models, and the modules that a retrofit leaves in them. It decides nothing."""
