"""A step inside torch.autocast computes the constraint in its own precision."""

from __future__ import annotations

import pytest
import torch

from lip_plugin import LipschitzMuon, attach_projection, certify, project_
from lip_plugin.config_values import METHOD_NAMES
from lip_plugin.linalg.polar import orthogonalize
from lip_plugin.linalg.projections import project
from tests.support.families import inputs_for
from tests.support.oracles import loss_of, paper, rand, random_model, worst_over_cap

AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_projections_are_the_same_to_the_bit(method: str) -> None:
    blocks = rand(2, 300, 260, seed=1).float()
    expected = project(blocks, 1.0, method, lr=0.1, weight_decay=1.0)
    with torch.autocast(**AUTOCAST):
        assert torch.equal(project(blocks, 1.0, method, lr=0.1, weight_decay=1.0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalizing_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    blocks = rand(2, 300, 260, seed=2).float()
    expected = orthogonalize(blocks, dtype=dtype)
    with torch.autocast(**AUTOCAST):
        assert torch.equal(orthogonalize(blocks, dtype=dtype), expected)


@pytest.mark.parametrize("kind", ["muon", "attached"])
def test_caps_hold_after_steps_inside_autocast(kind: str) -> None:
    """Without the guard the weights of this very run became inf."""
    model = random_model("gpt2", paper(), hidden_size=128)
    project_(model)
    optimizer: torch.optim.Optimizer
    if kind == "muon":
        optimizer = LipschitzMuon(model, lr=0.2)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach_projection(optimizer, model)
    for _ in range(10):
        with torch.autocast(**AUTOCAST):
            loss_of(model, inputs_for("gpt2")).backward()
            optimizer.step()
        optimizer.zero_grad()
        assert worst_over_cap(model) <= 1 + 1e-3
    alone = certify(model).lipschitz
    with torch.autocast(**AUTOCAST):
        assert certify(model).lipschitz == alone
