"""What a model is, and the modules that a retrofit leaves in it. Decides nothing."""
