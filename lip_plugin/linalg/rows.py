"""Distances between the rows of a matrix.

The difference of two outputs of W x is (w_i - w_j) x, so the distance of two rows says how fast
that difference can move. The certificate uses it for differences of two logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lip_plugin.linalg.norms import row_rms_max_upper, sum_rms_max_upper
from lip_plugin.linalg.spectrum import SLACK, gamma

_ROWS = 4096  # rows that are converted to float64 at a time
_ALL_PAIRS_UP_TO = 8192  # rows; beyond that, pairs cost more than a whole certificate


@torch.no_grad()
def row_distance_max_upper(w: Tensor) -> float:
    """Proven upper bound of the largest norm2(w_i - w_j) over all pairs of rows.

    Up to 8192 rows all pairs are compared. For more rows it is twice the largest distance from
    their mean, which is at most twice too high.

    Args:
        w: [n, d], of any float dtype.

    Returns:
        The bound, as a float.

    Raises:
        NonFiniteError: An entry is nan or inf.
    """
    w = w.detach()
    if w.numel() == 0:
        return 0.0
    root_d = math.sqrt(w.shape[1]) * SLACK
    if len(w) <= _ALL_PAIRS_UP_TO:
        return sum_rms_max_upper([w, -w]) * root_d
    # Any point would do in place of the mean, so its own rounding does not matter. Only that of the
    # differences does.
    centre = w.mean(0, dtype=torch.float64)
    farthest, size = 0.0, float(row_rms_max_upper(w) + row_rms_max_upper(centre[None]))
    for rows in w.split(_ROWS):
        farthest = max(farthest, float(row_rms_max_upper(rows.double() - centre)))
    return 2.0 * (farthest + gamma(4) * size) * root_d
