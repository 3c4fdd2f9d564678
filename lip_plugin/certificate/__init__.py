"""Proofs about a model.

This package turns a model into an executable graph, proves upper bounds from that graph, and
attacks them from below. `certify.py` is the place to start reading.
"""

from lip_plugin.opening import open_house

open_house()
