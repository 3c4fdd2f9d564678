"""Does the object that was passed compute what the graph computes?"""
