"""The rules of a floor under a norm hold against attacks, alone and in models.

They are for the constant, the radius, local changes, rounding and drift.
"""

from __future__ import annotations

import copy
import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lip_plugin import (
    calibrate,
    certify,
    drift,
    falsify,
    forward_rounding_upper,
    own_caps,
    retrofit,
)
from lip_plugin.certificate.comparison.compare import check_graph
from lip_plugin.certificate.diagnostics.rounding import Arithmetic, rounding
from lip_plugin.certificate.graph.base import ProvenNorms
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.graph.nodes import Norm
from lip_plugin.certificate.robustness.rules import norm_rule
from lip_plugin.model.normalization import Floored, floor_
from tests.support.families import FAMILIES, inputs_for
from tests.support.oracles import paper
from tests.support.pretrained_models import calibrated, lively, logits

# A floor that half of the tokens are below is tried on all families. A floor that no token is
# below, or that all are far below, is slow there, and is tried on a few.
QUICK = ("gpt2", "llama", "gemma3", "bert")
ENDS = [(0.0, 1.0), (1.0, 4.0)]
MIDDLE = [(f, 0.5, 1.0) for f in FAMILIES] + [(f, *end) for f in QUICK for end in ENDS]
SLOW = [
    pytest.param(f, *end, marks=pytest.mark.slow)
    for f in FAMILIES
    if f not in QUICK
    for end in ENDS
]


@pytest.mark.parametrize(("family", "quantile", "times"), [*MIDDLE, *SLOW])
def test_the_graph_is_the_model_and_no_attack_exceeds_the_certificate(
    family: str, quantile: float, times: float
) -> None:
    model = calibrated(family, quantile, times, num_hidden_layers=1).double()
    assert check_graph(build(model)) <= 1e-4
    found, attack = certify(model), falsify(model, restarts=1, steps=2, tokens=4)
    assert math.log10(attack.lower_bound) <= found.log10_lipschitz
    assert math.isfinite(certify(model, "caps").log10_lipschitz)
    if family not in QUICK:
        return  # drift too is slow
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            if p.dim() < 3:
                p.mul_(1.001)
    apart = drift(model, other, restarts=2, steps=4)
    assert 0 < apart.logit_lower <= apart.logit_upper


def _alone(kind: str, floor: float, width: int = 6) -> tuple[Any, Norm]:
    """A norm module with a floor, float64, and its node."""
    if kind == "LayerNorm":
        module: Any = nn.LayerNorm(width)
        nn.init.normal_(module.bias)
    else:
        module = LlamaRMSNorm(width)
    nn.init.normal_(module.weight)
    floor_(module.double().requires_grad_(False), "slot", floor)
    facts = module.facts
    node = Norm(
        "slot", module, facts.eps, facts.center, module.weight, getattr(module, "bias", None), floor
    )
    return module, node


@pytest.mark.parametrize("floor", [1e-3, 0.3, 5.0])
@pytest.mark.parametrize("kind", ["LayerNorm", "LlamaRMSNorm"])
def test_a_norm_alone_is_within_its_rule_and_attains_it_below_the_floor(
    kind: str, floor: float
) -> None:
    module, node = _alone(kind, floor)
    bound = float(node.bound(Decimal(7), ProvenNorms()).lipschitz)
    assert bound == pytest.approx(
        float(module.weight.abs().max()) / max(floor, module.facts.eps**0.5), rel=1e-9
    )
    worst = 0.0
    for size in (0.1, 0.5, 0.9, 0.99, 1.0, 1.01, 1.5, 10.0):  # around the kink as well
        x = torch.randn(400, 6, dtype=torch.float64)
        x = size * floor * x / x.square().mean(-1, keepdim=True).sqrt()
        y = (
            x
            + torch.randn_like(x)
            * floor
            * torch.logspace(-6, 0.5, 400, dtype=torch.float64)[:, None]
        )
        moved = (module(x) - module(y)).norm(dim=-1) / (x - y).norm(dim=-1)
        worst = max(worst, float(moved.max()))
        radius = node.bound(
            Decimal(float(x.square().mean(-1).sqrt().max()) * (1 + 1e-9)), ProvenNorms()
        ).radius
        assert float(module(x).square().mean(-1).sqrt().max()) <= float(radius)
    assert worst <= bound * (1 + 1e-9)
    steep = torch.zeros(1, 6, dtype=torch.float64)
    steep[0, int(module.weight.abs().argmax())] = 1e-3 * floor
    attained = float(((module(steep) - module(-steep)).norm() / (2 * steep.norm())).detach())
    share = (
        math.sqrt(5 / 6) if module.facts.center else 1.0
    )  # centering takes the mean of the one entry
    assert attained >= 0.9 * share * bound if floor > 0.01 else attained <= bound
    # The rule for no floor says more, never less. So leaving the floor out of the rule is seen.
    assert (
        float(Norm(**{**node.__dict__, "floor": 0.0}).bound(Decimal(7), ProvenNorms()).lipschitz)
        >= bound
    )
    wrong = Norm(**{**node.__dict__, "floor": 2 * floor}).bound(Decimal(7), ProvenNorms())
    assert float(wrong.lipschitz) < attained or floor < 0.01


@pytest.mark.parametrize("floor", [0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["LayerNorm", "LlamaRMSNorm"])
def test_a_norm_moves_and_bends_no_more_than_its_local_rule_says(kind: str, floor: float) -> None:
    module, node = _alone(kind, floor, width=5)
    run = module if kind == "LayerNorm" else node.run  # Llama's computes in float32
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 5, generator=generator, dtype=torch.float64) * (0.1 + 0.05 * seed)
        size = torch.tensor([0.003, 0.1, 0.5, 2.0], dtype=torch.float64)[:, None]
        moved, curved = norm_rule(node, x, size)
        jacobian = torch.autograd.functional.jacobian(lambda v: run(v[None])[0], x[0])
        for i, radius in enumerate(size[:, 0].tolist()):
            step = torch.randn(2000, 5, generator=generator, dtype=torch.float64)
            step = radius * step / step.norm(dim=-1, keepdim=True)
            change = run(x + step) - run(x)
            assert float(change.norm(dim=-1).max()) <= float(moved[i, 0]) * (1 + 1e-9)
            bent = (change - step @ jacobian.T).norm(dim=-1).max()
            assert float(bent) <= float(curved[i, 0]) * (1 + 1e-9) + 1e-12, (seed, radius)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "bert"])
def test_rounding_of_a_calibrated_model_is_within_its_bound(family: str) -> None:
    for quantile in (0.0, 0.5, 1.0):
        model = calibrated(family, quantile, num_hidden_layers=1)
        inputs = inputs_for(family)
        exact = logits(copy.deepcopy(model).double(), inputs)
        off = (logits(model, inputs).double() - exact).square().mean(-1).sqrt().max()
        assert float(off) <= forward_rounding_upper(model, torch.float32, inputs.shape[1])


def test_rounding_of_a_norm_without_a_gain_is_within_its_bound() -> None:
    """Rounding of a norm without a gain is within its bound.

    Its width is not in a weight. A large mean is what costs.
    """
    for width in (64, 4096):
        module = nn.LayerNorm(width, elementwise_affine=False)
        floor_(module, "slot", 0.5)
        node = Norm("slot", module, module.eps, True, None, None, 0.5)
        x = torch.linspace(-1, 1, width)[None] + 1e4
        off = float((module(x).double() - node.run(x.double())).square().mean().sqrt())
        size = Decimal(float(x.double().square().mean().sqrt())) * Decimal("1.000001")
        assert off > 0
        assert off <= float(
            rounding(node, size, Decimal(0), ProvenNorms(), Arithmetic.of(torch.float32, 1))
        )


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gemma3", "olmo2", "bert", "gpt_neox", "opt", "nanogpt"]
)
def test_lower_floors_are_nearer_to_the_model_and_higher_ones_prove_more(family: str) -> None:
    if family not in FAMILIES:
        pytest.skip("no stand-in")
    model, inputs = lively(family), inputs_for(family)
    before, off, proven = logits(model, inputs), [], []
    for quantile in (0.0, 0.3, 1.0):
        twin = copy.deepcopy(model)
        floors = calibrate(twin, [inputs], quantile=quantile)
        retrofit(twin, paper(norms="calibrated", norm_floors=floors, overrides=own_caps(twin)))
        off.append(float((logits(twin, inputs) - before).norm() / before.norm()))
        proven.append(certify(twin).log10_lipschitz)
    assert off[0] < 1e-4
    assert off[0] < off[1] < off[2]
    assert proven[0] > proven[1] > proven[2]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_half_precision_computes_inside_as_norms_do(family: str) -> None:
    for quantile in (0.0, 1.0):
        model = calibrated(family, quantile, times=2.0)
        slots = [m for m in model.modules() if isinstance(m, Floored)]
        for slot in slots:
            x = (
                torch.randn(3, 5, slot.weight.shape[-1]) + 10.0
            )  # a large mean, which bfloat16 would lose
            exact = copy.deepcopy(slot).double()(x.bfloat16().double())
            got = slot.bfloat16()(x.bfloat16())
            assert got.dtype == torch.bfloat16
            assert (got.double() - exact).abs().max() <= 2**-6 * exact.abs().max()


@pytest.mark.parametrize("floor", [1e-5, 1e-3, 1e3, 1e4])
def test_float16_gains_over_floors_neither_overflow_nor_vanish(floor: float) -> None:
    module, _ = _alone("LayerNorm", floor, width=8)
    with torch.no_grad():
        module.weight.fill_(2.0 if floor < 1 else 1e-3)
        module.bias.zero_()
    module.half()
    size = (
        floor * torch.logspace(-2, 2 if floor < 1 else 0.2, 64)[:, None]
    )  # on both sides, within float16
    x = (torch.randn(64, 8) * size).half().float().requires_grad_(True)
    y = module(x.half())
    exact = copy.deepcopy(module).double()(x.detach().half().double())
    assert torch.isfinite(y).all()
    assert (y.double() - exact).abs().max() <= 2**-9 * exact.abs().max() + 2**-24
    y.float().sum().backward()
    assert torch.isfinite(x.grad).all()
