"""peft: adapters within caps and budgets."""
