"""How far apart two results are, relative to what was computed, and how far they may be."""

from __future__ import annotations

import math

from torch import Tensor

# The largest difference that is allowed, relative to what a layer adds to its input. Libraries
# compute norms, softmax and rotations in float32 inside, which costs 1e-7 each; 1e-6 was seen over
# a layer. A function that differs from the graph's is off by far more.
TOLERANCE = 1e-4


# Every layer adds its input, in float64, to what it computes. The rounding of that sum is at most
# this share of the input.
_ROUNDING = 1e-12


def relative_difference(got: Tensor, expected: Tensor, own: Tensor | None = None) -> float:
    """The largest difference of two entries, over the largest entry of what was computed.

    If `own` is given, what was computed is `expected` minus `own`. The result is inf if the shapes
    differ, and nan if an entry is nan.
    """
    if got.shape != expected.shape:
        return math.inf
    off = float((got - expected).abs().amax())
    if own is None:
        size = float(expected.abs().amax())
    else:
        off = max(0.0, off - _ROUNDING * float(own.abs().amax())) if off == off else off
        size = float((expected - own).abs().amax())
    return 0.0 if off == 0 else off / size if size > 0 else math.inf
