"""The executable graph: nodes that run what the model computes, and bound it."""
