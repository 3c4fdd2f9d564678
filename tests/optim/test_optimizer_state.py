"""An optimizer's state brings back rates and moments, and never caps.

Caps, kinds and methods are those that the model has now.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lip_plugin import LipschitzMuon, certify, retrofit
from lip_plugin.model.layers import constrained_modules
from lip_plugin.optim import muon
from tests.support.families import tiny
from tests.support.oracles import CAP_TOLERANCE, paper, randomize_, worst_over_cap


def started(dtype: torch.dtype = torch.float32, **config) -> tuple[nn.Module, LipschitzMuon]:
    model = tiny("llama", hidden_size=16, num_hidden_layers=1).to(dtype)
    randomize_(model)
    retrofit(model, paper(init="keep", **config))
    return model, LipschitzMuon(model, lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def test_a_state_saved_under_wider_caps_does_not_bring_them_back():
    wide, old = started(w_max=2.0)
    for seed in range(5):
        step(wide, old, seed)
    model, optimizer = started(w_max=0.5, method="hard_cap")
    optimizer.load_state_dict(old.state_dict())
    assert {g["method"] for g in optimizer.param_groups if g["kind"] == "matrix"} == {"hard_cap"}
    for seed in range(10):
        step(model, optimizer, seed)
        assert worst_over_cap(model) <= 1 + CAP_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_momenta_come_back_to_the_bit_in_their_own_dtype(dtype):
    model, optimizer = started(dtype)
    for seed in range(3):
        step(model, optimizer, seed)
    state = copy.deepcopy(optimizer.state_dict())
    again = copy.deepcopy(model)
    other = LipschitzMuon(again, lr=0.1)
    other.load_state_dict(state)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        if "momentum" in optimizer.state.get(p, {}):
            a, b = optimizer.state[p]["momentum"], other.state[q]["momentum"]
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    for seed in range(3, 5):
        step(model, optimizer, seed)
        step(again, other, seed)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_loading_keeps_the_process_group_and_a_pickle_has_none():
    _, optimizer = started()
    optimizer.process_group = "a group"
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.process_group == "a group"
    assert pickle.loads(pickle.dumps(optimizer)).process_group is None


def test_every_group_of_matrices_is_measured_in_its_turn(monkeypatch):
    model, optimizer = started()
    matrix = next(g for g in optimizer.param_groups if g["kind"] == "matrix")
    half = len(matrix["params"]) // 2
    second = {**matrix, "params": matrix["params"][half:], "layouts": matrix["layouts"][half:]}
    second["param_names"] = matrix["param_names"][half:]
    for key in ("params", "layouts", "param_names"):
        matrix[key] = matrix[key][:half]
    optimizer.param_groups.append(second)
    seen: set[int] = set()
    whole = muon.normalize_above_

    def watched(weights, layouts):
        seen.update(id(w) for w in weights)
        whole(weights, layouts)

    step(model, optimizer)  # all are unknown at first
    monkeypatch.setattr(muon, "normalize_above_", watched)
    monkeypatch.setattr(muon, "_MEASURE_EVERY", 4)
    for seed in range(4):
        step(model, optimizer, seed)
    assert seen == {id(p) for g in (matrix, second) for p in g["params"]}


@pytest.mark.parametrize("failing", ["project", "orthogonalize"])
def test_a_step_that_fails_on_the_way_leaves_every_block_within_its_cap(failing, monkeypatch):
    model, optimizer = started()
    step(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    whole, calls = getattr(muon, failing), []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room for the correction")
        return whole(*args, **kwargs)

    def steps():
        for seed in range(3):
            step(model, optimizer, seed)

    for at in range(3):  # at another call each time
        calls[:] = [1] * at
        monkeypatch.setattr(muon, failing, fails)
        with pytest.raises(MemoryError):
            steps()
        assert worst_over_cap(model) <= 1 + CAP_TOLERANCE
        monkeypatch.undo()
        step(model, optimizer, 9)
    assert worst_over_cap(model) <= 1 + CAP_TOLERANCE


def test_the_model_may_be_given_by_name():
    model, _ = started()
    assert certify(model=model).lipschitz == certify(model).lipschitz
    assert len(list(constrained_modules(model))) > 5
