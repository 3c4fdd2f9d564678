"""How far fine-tuning can have moved a logit."""
