"""The executable graph of a model. Each node runs what the model computes there, and bounds it.

`build.py` makes the graph. The rules are with the nodes: in `nodes.py`, `containers.py`,
`attention.py` and `joint_bounds.py`.
"""
