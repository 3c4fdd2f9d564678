"""TODO integrations/peft."""
