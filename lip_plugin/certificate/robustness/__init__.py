"""What is proven around one input: certified radii and accuracy, and attacks on both."""
