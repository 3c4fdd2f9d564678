"""A schedule on two real processes (gloo) has one set of constants and one end.

Replicas are equal to the bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.oracles import CAP_TOLERANCE
from tests.support.processes import on_two_processes

SCRIPT = Path(__file__).parents[1] / "support" / "schedule_ddp_script.py"


@pytest.mark.slow
def test_replicas_get_their_floors_together(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("gloo is not available")
    on_two_processes(SCRIPT, tmp_path)
    one, two = (torch.load(tmp_path / f"rank-{n}.pt", weights_only=True) for n in range(2))
    assert one["world_size"] == 2
    assert one["at_start"] == two["at_start"] == dict.fromkeys(one["floors"], 0.0)
    assert one["floors"] == two["floors"]
    assert min(one["floors"].values()) > 0
    assert one["end"] == two["end"] == (0.4, {})
    for name, weight in one["weights"].items():
        assert torch.equal(weight, two["weights"][name]), name
    assert max(one["worst"], two["worst"]) <= 1.0 + CAP_TOLERANCE
    assert one["steep"][-1] < 0.5 * one["steep"][0]
    assert not two["steep"]  # the first process alone logs
