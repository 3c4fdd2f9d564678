"""TODO integrations/huggingface."""
