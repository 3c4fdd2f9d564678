"""Around one given input: certified radii, certified accuracy, and the attacks beside them."""
