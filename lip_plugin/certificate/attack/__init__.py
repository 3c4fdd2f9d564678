"""Attacks from below: inputs that attain as much of a bound as can be found."""
