"""The absolute value of pairs in gated MLPs: its rules hold, are attained, and are about the model.

docs/maths/gates.md has the proofs.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lip_plugin import (
    LipschitzConfig,
    attacked_accuracy,
    certified_accuracy,
    certify,
    config_of,
    drift,
    falsify,
    forward_rounding_upper,
    project_,
    release,
    retrofit,
)
from lip_plugin.certificate.diagnostics.activation_report import activation_report
from lip_plugin.certificate.graph.base import LinearNorms, ProvenNorms
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.graph.containers import walk
from lip_plugin.certificate.graph.decimals import to_float, up
from lip_plugin.certificate.graph.nodes import Linear
from lip_plugin.certificate.graph.pairs import Modulus, Stacked
from lip_plugin.certificate.robustness.kinks import Bends
from lip_plugin.errors import CertificateError, ConfigError
from lip_plugin.model.pairs import PAIR_EPS, PAIR_SCALE, PairAbs, pair_abs
from tests.certificate.test_robustness import own_labels
from tests.support.families import inputs_for, tiny
from tests.support.oracles import logits_of, paper, rand, randomize_

GATED = ("llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "gemma2", "gemma3", "olmo2")
gated = pytest.mark.parametrize("family", GATED)


def with_pairs(family: str, **options: object) -> nn.Module:
    """A gated model whose product is the absolute value of pairs, with random weights."""
    model = tiny(family)
    retrofit(model, LipschitzConfig(biases="keep", **options))
    return randomize_(model)


def test_it_is_one_lipschitz_and_no_larger_than_its_input_in_rms_norm() -> None:
    """The slope is at most PAIR_SCALE for the 2-norm of a pair, and that is attained."""
    z = rand(2, 20_000, seed=1) * 10.0 ** (6 * rand(20_000, seed=2).clamp(-1, 1))
    d = rand(2, 20_000, seed=3) * 10.0 ** (6 * rand(20_000, seed=4).clamp(-1, 1))
    moved = (pair_abs(*(z + d)) - pair_abs(*z)).abs()
    # 1e-15 of the values: float64 computes each of them with a few roundings
    slack = 1e-15 * (z + d).norm(dim=0).maximum(z.norm(dim=0))
    assert bool((moved <= PAIR_SCALE * d.norm(dim=0) + slack).all())
    assert bool((pair_abs(*z) <= PAIR_SCALE * z.norm(dim=0) + slack).all())
    assert 2 * PAIR_SCALE**2 <= 1.0 < 2 * math.nextafter(PAIR_SCALE, 1) ** 2 + 4e-16
    far = torch.tensor([3e3, 4e3], dtype=torch.float64)
    slope = (pair_abs(*(far * 1.01)) - pair_abs(*far)) / (0.01 * far.norm())
    assert float(slope) == pytest.approx(PAIR_SCALE, rel=1e-9)


def test_its_gradient_is_a_number_at_zero_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        z = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
        pair_abs(z[0], z[1]).sum().backward()
        assert z.grad is not None
        assert not z.grad.any()


def test_the_remainder_is_at_most_that_of_the_rule_and_attains_it() -> None:
    """0 <= f(z + d) - f(z) - f'(z) d <= scale * min(d^2 / (2 R), 2 d)."""
    z, d = rand(2, 50_000, seed=5), rand(2, 50_000, seed=6) * 10 ** rand(50_000, seed=7)
    modulus = (z.square().sum(0) + PAIR_EPS).sqrt()
    slope = PAIR_SCALE * z / modulus
    rest = pair_abs(*(z + d)) - pair_abs(*z) - (slope * d).sum(0)
    size = d.norm(dim=0)
    bound = PAIR_SCALE * torch.minimum(size.square() / (2 * modulus), 2 * size)
    assert bool((rest >= -1e-14 * (1 + size)).all())  # rounding of numbers of about this size
    assert bool((rest <= bound + 1e-14 * (1 + size)).all())
    assert float((rest / bound).amax()) > 0.95


def stack(seed: int, biased: bool = True) -> tuple[Stacked, Tensor, Tensor]:
    gate, up_ = (rand(24, 8, seed=seed + i) for i in range(2))
    biases = [rand(24, seed=seed + 2 + i) if biased else None for i in range(2)]
    maps = [
        Linear(name, lambda w=w: w, lambda b=b: b, 24, 8)
        for name, w, b in zip(("gate", "up"), (gate, up_), biases, strict=True)
    ]
    return Stacked.of("mlp[gate, up]", *maps), gate, up_


def norms_of(gate: Tensor, up_: Tensor) -> ProvenNorms:
    norms = ProvenNorms()
    for name, w in (("gate", gate), ("up", up_)):
        sigma = up(float(torch.linalg.matrix_norm(w, 2)) * (1 + 1e-14))
        norms[name] = LinearNorms(sigma, sigma)
    return norms


@pytest.mark.parametrize("seed", range(5))
def test_the_stack_is_measured_from_above_and_below_what_the_single_norms_give(seed: int) -> None:
    node, gate, up_ = stack(10 * seed)
    norms = norms_of(gate, up_)
    apart = node.norm(norms)
    exact = float(torch.linalg.matrix_norm(torch.cat([gate, up_]), 2)) * math.sqrt(8 / 48)
    norms.joint[node.name] = node.measure(norms)
    assert exact <= to_float(node.norm(norms)) <= exact * (1 + 1e-6)
    assert node.norm(norms) <= apart
    x = rand(1000, 8, seed=99)
    y = node.run(x)
    found = node.bound(up(float(x.square().mean(-1).sqrt().amax())), norms)
    assert float(y.square().mean(-1).sqrt().amax()) <= to_float(found.radius)
    out = Modulus("act", PairAbs()).run(y)
    assert float(out.square().mean(-1).sqrt().amax()) <= to_float(found.radius)


def test_the_price_of_bends_is_above_everything_that_can_happen() -> None:
    for seed in range(30):
        n = 2 + seed % 5
        z, g = rand(2, n, seed=seed), rand(n, seed=seed + 50)
        modulus = (z.square().sum(0) + PAIR_EPS).sqrt()
        reach, total = rand(n, seed=seed + 100).abs() + 0.1, float(rand(1, seed=seed).abs()) + 0.05
        size = torch.ones(1, 1, 1, dtype=torch.float64)
        bends = Bends(modulus[None, None], (size,), (reach,), total * size, PAIR_SCALE)
        price = float(bends.price(g[None, None])[0, 0, 0])
        d = rand(20_000, 2, n, seed=seed + 150)
        d = d * (reach / d.norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0)
        d = d * (total / d.flatten(1).norm(dim=1)).clamp_max(1.0)[:, None, None]
        rest = (
            pair_abs(z[0] + d[:, 0], z[1] + d[:, 1])
            - pair_abs(*z)
            - (PAIR_SCALE * z / modulus * d).sum(1)
        )
        assert float(-(rest * g).sum(-1).amin()) <= price + 1e-12


@gated
def test_a_gated_mlp_computes_it_and_is_bounded_by_one_from_caps(family: str) -> None:
    model = with_pairs(family)
    assert any(isinstance(node, Modulus) for node in walk(build(model).body.nodes))
    found = certify(model)
    assert 0 < falsify(model, restarts=1, steps=5, tokens=7).lower_bound <= found.lipschitz
    project_(model)
    scale = config_of(model).logit_scale
    # every layer is within 1, and CAP_SLACK is 1.001 for each of its four maps
    assert certify(model, "caps").lipschitz <= scale * 1.001**12


@gated
def test_predictions_stay_within_their_radius(family: str) -> None:
    model = with_pairs(family, logit_scale=3.0)
    project_(model)
    batch = own_labels(model, inputs_for(family, 2, 8))
    sizes = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
    certified = certified_accuracy(model, [batch], sizes)
    attacked = attacked_accuracy(model, [batch], sizes, restarts=2, steps=10)
    assert not bool((certified.right & ~attacked.right).any())
    assert certified.accuracy[0] > 0.5
    assert attacked.accuracy[-1] < 0.5


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_drift_rounding_and_reach_hold(family: str) -> None:
    model = with_pairs(family)
    project_(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "gate" in name or "up" in name:
                p.add_(0.01 * rand(*p.shape, seed=5).to(p.dtype))
    found = drift(model, other, restarts=1, steps=3)
    assert 0 < found.logit_lower <= found.logit_upper < math.inf
    x = inputs_for(family, 8, 16)
    exact = logits_of(copy.deepcopy(model).double(), x)
    off = (logits_of(model, x).double() - exact).detach().square().mean(-1).sqrt().amax()
    assert 0 < float(off) <= forward_rounding_upper(model, torch.float32, 16) < 0.05
    for row in activation_report(model, x).rows:
        assert row.seen <= row.proven


def test_it_stays_over_release_and_another_retrofit_and_gate_max_is_refused() -> None:
    model, x = with_pairs("llama"), inputs_for("llama")
    expected = logits_of(model, x)
    release(model)
    assert torch.equal(logits_of(model, x), expected)
    with pytest.raises(ConfigError, match="gate_max"):
        retrofit(model, paper(gate_max=8.0))
    retrofit(model, paper())
    assert isinstance(model.model.layers[0].mlp.act_fn, PairAbs)
    with pytest.raises(ConfigError, match="gate_max"):
        retrofit(tiny("llama"), LipschitzConfig(activation="abs", gate_max=8.0))
    retrofit(kept := tiny("llama"), LipschitzConfig(gate_max=8.0))
    assert config_of(kept).activation is None


def test_a_forward_that_does_not_multiply_is_an_error_and_a_patch_is_found() -> None:
    half, u = PairAbs()(torch.ones(3)), torch.ones(3)
    refused = (
        *(lambda: half + u, lambda: torch.sqrt(half), lambda: half @ u, lambda: u - half),
        *(lambda: half * 2.0, lambda: 2.0 * half, lambda: half * u[:1], lambda: half * half),
    )
    for wrong in refused:
        with pytest.raises(TypeError):
            wrong()
    model = with_pairs("llama")
    act = model.model.layers[0].mlp.act_fn
    act.forward = lambda x: PairAbs.forward(act, 1.01 * x)
    with pytest.raises(CertificateError):
        certify(model)
