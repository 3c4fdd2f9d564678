"""Distances between the rows of a matrix: how fast a difference of two outputs can move."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lip_plugin.linalg.norms import row_rms_max_upper, sum_rms_max_upper
from lip_plugin.linalg.spectrum import SLACK, gamma

_ROWS = 4096  # converted to float64 at a time
_ALL_PAIRS_UP_TO = 8192  # rows; beyond, pairs cost more than the whole certificate


@torch.no_grad()
def row_distance_max_upper(w: Tensor) -> float:
    """Proven upper bound of the largest norm2(w_i - w_j) over pairs of rows of `w` [n, d].

    All pairs up to 8192 rows. For more, twice the largest distance from their mean, which is at most
    twice too high. Raises NonFiniteError.
    """
    w = w.detach()
    if w.numel() == 0:
        return 0.0
    root_d = math.sqrt(w.shape[1]) * SLACK
    if len(w) <= _ALL_PAIRS_UP_TO:
        return sum_rms_max_upper([w, -w]) * root_d
    centre = w.mean(
        0, dtype=torch.float64
    )  # any point will do: only the rounding of the difference matters
    farthest, size = 0.0, float(row_rms_max_upper(w) + row_rms_max_upper(centre[None]))
    for rows in w.split(_ROWS):
        farthest = max(farthest, float(row_rms_max_upper(rows.double() - centre)))
    return 2.0 * (farthest + gamma(4) * size) * root_d
