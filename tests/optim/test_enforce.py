"""project_() and attach_projection() hold the same caps with any optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lip_plugin import LipschitzConfig, LipschitzMuon, attach_projection, project_, retrofit
from lip_plugin.config_values import METHOD_NAMES
from lip_plugin.errors import ConfigError, LipschitzError, NonFiniteError, NotRetrofittedError
from lip_plugin.model import adapters
from lip_plugin.model.adapters import BlockNorms, LayerWrapper, register_layer_wrapper
from lip_plugin.model.layers import constrained_modules
from lip_plugin.surgery.block_norms import block_norms
from tests.support.families import FAMILIES, HEADS, tiny
from tests.support.oracles import (
    CAP_TOLERANCE,
    assert_unchanged,
    fingerprint,
    loss_of,
    paper,
    randomize_,
    worst_over_cap,
)


def small(family: str = "gpt2", config: LipschitzConfig | None = None) -> nn.Module:
    model = tiny(family, hidden_size=16, num_hidden_layers=1)
    retrofit(model, config or paper())
    return model


def text() -> torch.Tensor:
    return torch.arange(16).remainder(7).repeat(2, 1)


def steps(model: nn.Module, optimizer, count: int, after=None) -> list[float]:
    losses = []
    for _ in range(count):
        loss = loss_of(model, text())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if after is not None:
            after()
    return losses


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.03)


def torch_muon(model):
    """torch.optim.Muon, which takes matrices only. What it does not step is frozen here."""
    matrices = [m.weight for _, m in constrained_modules(model) if m.layout.norm != "row"]
    for _, m in constrained_modules(model):
        m.weight.requires_grad_(m.layout.norm != "row")
    return torch.optim.Muon(matrices, lr=0.05, weight_decay=0.0)


def accelerated(model):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(adamw(model))


OPTIMIZERS = [sgd, adamw, torch_muon, accelerated]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_after_every_step_of_any_optimizer_every_block_is_within_its_cap(family, make):
    model = small(family)
    optimizer = make(model)
    attach_projection(optimizer, model)
    worst = []
    losses = steps(model, optimizer, 40, lambda: worst.append(worst_over_cap(model)))
    assert max(worst) <= 1.0 + CAP_TOLERANCE
    assert max(worst) > 0.98  # the caps were reached
    assert losses[-1] < losses[0]
    assert getattr(optimizer, "optimizer", optimizer).seconds_projecting > 0


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_after_remove_nothing_is_projected_any_more(make):
    model = small()
    optimizer = make(model)
    handle = attach_projection(optimizer, model)
    steps(model, optimizer, 5)
    handle.remove()
    worst = 0.0
    for _ in range(60):  # no further than needed: without its caps SGD at this rate diverges
        steps(model, optimizer, 1)
        worst = worst_over_cap(model)
        if worst > 1.0 + CAP_TOLERANCE:
            break
    assert worst > 1.0 + CAP_TOLERANCE


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_holds_the_caps_under_adamw_and_sgd_at_large_rates(method):
    for optimizer_class, lr in ((torch.optim.AdamW, 0.05), (torch.optim.SGD, 5.0)):
        model = small("llama", paper(method=method, w_max=0.8))
        optimizer = optimizer_class(model.parameters(), lr=lr)
        attach_projection(optimizer, model)
        steps(model, optimizer, 15, lambda m=model: check(m))


def check(model: nn.Module) -> None:
    assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_method_chosen_at_the_call_wins_over_the_configs(method):
    model = small("gpt2", paper(method="hard_cap"))
    optimizer = adamw(model)
    attach_projection(optimizer, model, method=method)
    steps(model, optimizer, 3)
    value = torch.linalg.svdvals(model.transformer.h[0].mlp.c_fc.weight.detach().double())
    value = value * math.sqrt(16 / 64)
    if method == "stiefel":
        assert torch.allclose(value, torch.ones_like(value), rtol=1e-3)
    else:
        assert float(value.min()) < 0.999


def test_attaching_brings_a_model_within_its_caps_before_the_first_step():
    model = randomize_(small())
    assert worst_over_cap(model) > 1.2
    attach_projection(adamw(model), model)
    assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE


def test_a_skipped_step_projects_nothing():
    """A skipped step projects nothing.

    A gradient scaler skips steps, and the projection sits on the optimizer's own hook.
    """
    model = small()
    optimizer = adamw(model)
    attach_projection(optimizer, model)
    optimizer.seconds_projecting = 0.0
    loss_of(model, text()).backward()
    assert optimizer.seconds_projecting == 0.0
    optimizer.step()
    assert optimizer.seconds_projecting > 0.0


def test_frozen_weights_keep_every_bit():
    model = small()
    frozen = model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    attach_projection(optimizer, model)
    steps(model, optimizer, 5)
    assert torch.equal(frozen, before)


@pytest.mark.parametrize(
    "call", [project_, lambda m: attach_projection(adamw(m), m), LipschitzMuon, block_norms]
)
def test_without_a_retrofit_there_is_an_error_and_not_silence(call):
    model = tiny("llama")
    before = fingerprint(model)
    with pytest.raises(NotRetrofittedError, match=r"retrofit\(model"):
        call(model)
    assert_unchanged(model, before)
    assert issubclass(NotRetrofittedError, LipschitzError)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_project_returns_norms_that_bound_the_truth_and_are_within_the_caps(family, method):
    head = HEADS.get(family, "lm_head")
    model = randomize_(small(family, paper(w_max=0.7, overrides={head: 2.0})))
    assert worst_over_cap(model) > 1.2
    report = project_(model, method)
    assert [b.name for b in report] == [n for n, _ in constrained_modules(model)]
    assert worst_over_cap(model) <= max(b.worst_over_cap for b in report) <= 1.0 + CAP_TOLERANCE
    assert sum(b.count for b in report) == sum(
        s.count for _, m in constrained_modules(model) for s in m.layout.segments
    )
    again = {n: p.detach().clone() for n, p in model.named_parameters()}
    project_(model, "hard_cap")  # what is within its cap already is left to the last bit
    assert all(torch.equal(p, again[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_reported_norms_are_proven_from_above_layer_by_layer(family):
    model = randomize_(small(family))
    modules = dict(constrained_modules(model))
    for entry in block_norms(model):
        module, worst = modules[entry.name], 0.0
        for segment, blocks in module.layout.views(module.weight.detach().double()):
            if module.layout.norm == "row":
                sizes = blocks.square().mean(-1).sqrt()
            else:
                sizes = torch.linalg.svdvals(blocks)[..., 0] * math.sqrt(
                    blocks.shape[-1] / blocks.shape[-2]
                )
            worst = max(worst, float(sizes.max()) / segment.cap)
        assert worst <= entry.worst_over_cap <= worst * 1.001  # the promise: within 0.1 %


def test_project_refuses_weights_that_are_not_finite_and_changes_nothing():
    model = randomize_(small())
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    before = fingerprint(model)
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight"):
        project_(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "call", [project_, lambda m, method: attach_projection(adamw(m), m, method)]
)
def test_an_unknown_method_is_refused_by_name_before_anything_is_changed(call):
    model = randomize_(small())
    before = fingerprint(model)
    with pytest.raises(ConfigError, match="magic"):
        call(model, "magic")
    assert_unchanged(model, before)


def test_a_model_in_a_wrapper_is_projected_all_the_same():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    model = randomize_(small())
    project_(Wrapper(model))
    assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE


class Recorder(LayerWrapper):
    kind = "recorder"

    def __init__(self):
        self.calls, self.merged = [], BlockNorms("lm_head", 0.75, 1)

    def project_(self, model, method, lr):
        self.calls.append((method, lr))
        return 0

    def norms(self, model):
        return [self.merged]


def test_a_registered_wrapper_is_called_by_every_projection(monkeypatch):
    monkeypatch.setattr(adapters, "_WRAPPERS", {})
    recorder = Recorder()
    for _ in range(2):  # twice is once
        register_layer_wrapper(recorder)
    model = small()
    # its norms are reported in the place of the plain ones
    assert recorder.merged in project_(model, lr=0.25)
    optimizer = adamw(model)
    attach_projection(optimizer, model)
    steps(model, optimizer, 2)
    # by project_, when it is attached, and after each of two steps
    assert recorder.calls == [
        ("soft_cap", 0.25),
        ("soft_cap", 0.0),
        ("soft_cap", 0.03),
        ("soft_cap", 0.03),
    ]
