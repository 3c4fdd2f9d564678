"""What depth.py is made of."""
