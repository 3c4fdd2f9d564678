"""The comparison of a graph with the object that the user passed.

A certificate is proven for the graph. It is about the object only if both compute the same, so they
are compared before a number is given. `compare.py` is the place to start reading.
"""
