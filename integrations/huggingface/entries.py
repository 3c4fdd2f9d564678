"""The entries of LipschitzCallback in the log of a run, within a share of the run's time.

`Entries` decides what an entry has time for, and remembers the last certificate, so that a save at
the same step measures nothing again.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from lip_plugin.certificate.result import Certificate
from lip_plugin.distributed.owners import on_first
from lip_plugin.integrations.huggingface.metrics import (
    Measured,
    certificate_or_reason,
    measured,
)
from lip_plugin.training.time_share import FREE, TimeShare, expected_seconds

# What a part may take of the share. A cheap one must not use up the time of the certificate.
_OF_SHARE = {"weights": 0.7, "caps": 0.2, "seen": 0.1}


class Entries:
    """Measures what an entry of the log has time for. Every process makes the same calls.

    Args:
        share: of the run's time that all entries together may take; 1 measures all of them.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.ids: torch.Tensor | None = None
        self._latest: Certificate | None = None
        self._times: dict[str, TimeShare] = {}
        self._projected = (0, 0.0)  # at the last entry: step, and seconds in projections

    def begin(self, model: nn.Module, ids: torch.Tensor | None, step: int) -> None:
        """Start counting time, for a model and the sequences that it is seen on."""
        self.ids, self._latest, self._projected = ids, None, (step, 0.0)
        whole = self.share >= 1.0
        self._times = {
            part: TimeShare(1.0 if whole else self.share * of, FREE * of)
            for part, of in _OF_SHARE.items()
        }
        if not whole:
            self._times["weights"].expect(on_first(lambda: expected_seconds(model)))

    @property
    def seconds(self) -> float:
        """Seconds that all entries took so far."""
        return sum(times.spent for times in self._times.values())

    def entry(self, model: nn.Module, step: int, seconds_projecting: float) -> Measured:
        """One entry: what there is time for now, and the times themselves."""
        wanted = on_first(lambda: [p for p, times in self._times.items() if times.due()])
        before, began = self.seconds, time.perf_counter()
        found = measured(model, self.ids, wanted) if wanted else Measured({}, [])
        # What a sharded model takes to be gathered. A part that is measured alone pays it alone.
        around = time.perf_counter() - began - sum(found.seconds.values())
        for part, took in found.seconds.items():
            self._times[part].count(took + around)
        self._latest = found.certificate
        values = found.values
        steps, seconds = self._projected
        each = (seconds_projecting - seconds) / max(1, step - steps)
        self._projected = step, seconds_projecting
        values["lip/seconds_projecting"] = seconds_projecting
        values["lip/seconds_projecting_step"] = each
        values["lip/seconds_certifying"] = self.seconds
        values["lip/seconds_certifying_entry"] = self.seconds - before
        return found

    def write(self, model: nn.Module, folder: Path) -> str | None:
        """Write `certificate.json`, or return the reason why there is none."""
        return certificate_or_reason(model, folder, self._latest)
