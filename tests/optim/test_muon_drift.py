"""What the rounding of single steps adds up to is caught by the measurement every hundred steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lip_plugin import LipschitzMuon, retrofit
from lip_plugin.optim import muon
from lip_plugin.surgery.block_norms import block_norms
from tests.support.families import tiny
from tests.support.oracles import paper


def worst_after(steps: int) -> float:
    model = tiny("gpt2")
    retrofit(model, paper())
    optimizer = LipschitzMuon(model, lr=1e-6)  # so small that nothing but the drift moves a norm
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    for _ in range(steps):
        optimizer.step()
    return max(b.worst_over_cap for b in block_norms(model))


def test_a_projection_that_leaves_a_little_too_much_each_step_is_caught(
    monkeypatch: pytest.MonkeyPatch,
):
    def drifting(blocks: Tensor, *args, **kwargs) -> Tensor:
        return blocks * (1 + 1e-5)  # too little for any one step to show

    monkeypatch.setattr(muon, "project", drifting)
    # 100 steps of 1e-5 on top of the 5e-4 that a measurement lets pass
    assert worst_after(250) <= 1 + 5e-4 + 100 * 1.1e-5
    monkeypatch.setattr(muon, "_MEASURE_EVERY", 10**9)
    assert worst_after(250) > 1 + 2e-3  # without the measurement it adds up
