"""peft: adapters that are held within caps and budgets."""
