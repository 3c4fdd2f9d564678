"""TODO integrations/nanogpt."""
