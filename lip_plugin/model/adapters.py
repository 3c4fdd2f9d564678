"""TODO lip_plugin.model.adapters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockNorms:
    """Proven upper bounds of one weight's blocks over their caps (RMS->RMS, or RMS for rows)."""

    name: str
    worst_over_cap: float
    count: int
