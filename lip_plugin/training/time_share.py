"""`TimeShare`: a measurement that takes long runs within a share of a run's time.

A certificate of a large model takes longer than many steps. It is due when the run has earned its
seconds: at most `share` of all time since the start, and a few seconds that are free.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from lip_plugin.linalg.norms import sigma_max_upper
from lip_plugin.model.batches import cost_of
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.layout import ROW

# Seconds that need not be earned. So small models and short runs are measured from the start, and
# nobody waits longer than this for a first certificate.
FREE = 3.0
# Norms of single blocks are this part of a certificate; the joint rules, the head and the
# comparison of graph and model are the rest (GPT-2 small: 5.1 of 12.8 seconds).
_PART = 0.4


class TimeShare:
    """Says whether a measurement is due, by what the one before it took.

    Args:
        share: of all time since `begin`, for all measurements together. With 1 it is always due.
        free: seconds that need not be earned.
        clock: seconds, for tests.
    """

    def __init__(
        self, share: float, free: float = FREE, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.share, self.free, self.clock = share, free, clock
        self.begin()

    def begin(self) -> None:
        """Start counting."""
        self.began, self.spent = self.clock(), 0.0
        self._takes = 0.0

    def expect(self, seconds: float) -> None:
        """Say what the first measurement is likely to take."""
        self._takes = seconds

    def due(self) -> bool:
        """Whether there is time for a measurement now."""
        if self.share >= 1.0:
            return True
        earned = self.free + self.share * (self.clock() - self.began)
        return self.spent + self._takes <= earned

    def count(self, seconds: float) -> None:
        """Say what the measurement just took. The next one is expected to take as long."""
        self.spent += seconds
        self._takes = seconds


def expected_seconds(model: nn.Module) -> float:
    """About how long a certificate from weights will take. It costs one small proof.

    Args:
        model: a retrofitted model, or one with budgets, in training.
    """
    found = [m for _, m in constrained_modules(model) if m.layout.norm != ROW]
    work = sum(cost_of(m.weight, m.layout) for m in found)
    if not work:
        return 0.0
    weight = found[0].weight
    sample = torch.ones(256, 1024, device=weight.device)
    sample[:, :256] += torch.eye(256, device=weight.device)
    took = []
    for _ in range(2):  # the first call pays for what is set up once
        start = time.perf_counter()
        float(sigma_max_upper(sample))
        took.append(time.perf_counter() - start)
    return work / (256 * 1024 * 256) * min(took) / _PART
