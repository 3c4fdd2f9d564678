"""Joint bounds of an MLP with its residual, and of a gate with its output map, hold.

They are attacked and attained, and weakened rules are exceeded.
"""

from __future__ import annotations

import decimal
from dataclasses import replace
from decimal import Decimal
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lip_plugin.certificate.graph import joint_bounds as joint
from lip_plugin.certificate.graph.base import ProvenNorms
from lip_plugin.certificate.graph.containers import Chain
from lip_plugin.certificate.graph.joint_bounds import MlpResidual
from lip_plugin.certificate.graph.nodes import Activation, Scale
from lip_plugin.model.activations import ACTIVATIONS, REPLACEMENTS, SLOPE_UPPER
from tests.support.joint_nodes import (
    EXACT,
    TIGHT,
    activation,
    attack,
    gated,
    joint_only,
    linear,
    measured,
    mlp,
    plain_only,
    rand,
    rms,
    secant,
    unit,
)

# the absolute value has no linear half: MlpResidual leaves it to the plain rule
HALVED = sorted(SLOPE_UPPER.keys() - REPLACEMENTS.keys())

# ---- MLP with its residual -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", HALVED)
def test_odd_parts_of_activations_are_as_small_and_flat_as_the_proof_says(kind: str) -> None:
    """The odd part e(z) = f(z) - z / 2 of an activation is as small and flat as is proven.

    abs(e) <= abs(z) / 2, and abs(e') <= slope - 1/2 on a grid of 1e-3.
    """
    z = torch.linspace(-40, 40, 80001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS[kind](z).sum(), z)
    e = (ACTIVATIONS[kind](z) - z / 2).detach()
    assert bool((e.abs() <= z.detach().abs() / 2 * (1 + 1e-15)).all())
    assert float((slope - 0.5).abs().max()) <= SLOPE_UPPER[kind] - 0.5 + 1e-15


@pytest.mark.parametrize("kind", HALVED)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_mlp_with_its_residual_is_attained_where_the_slope_is_extreme(
    kind: str, scaled: bool, sign: float
) -> None:
    """1 + the largest slope and 1 - the smallest one are attained where c g W_2 W_1 = +-I.

    relu at -I gives 1, where norms of single maps say 2.
    """
    act = activation(kind, scaled)
    z = torch.linspace(-8, 8, 160001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(act.run(z).sum(), z)
    at = float(z[(sign * slope).argmax()].detach())
    truth = 1 + float((sign * slope).max())
    turn = torch.linalg.qr(rand(3, 3, seed=1)).Q
    node, norms = mlp(2.0 * turn, turn.T.contiguous(), act, c=-0.5, g=-sign)
    radius, constant = joint_only(node, 8.0, norms)
    x = (turn.T @ torch.full((3,), -at, dtype=torch.float64))[None]
    move = (turn.T @ torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))[None] * 3**0.5
    seen = secant(node, x, move, h=1e-6 if kind != "relu" or abs(at) > 1e-3 else 1e-9)
    assert seen == pytest.approx(truth, rel=1e-6)
    assert seen <= constant * EXACT
    assert constant <= truth * (1 + 1e-5)
    size, _ = attack(node, 3, 1, 8.0, seed=2, steps=5)
    assert size <= radius * EXACT
    if kind == "relu" and not scaled and sign < 0:
        assert plain_only(node, 8.0, norms)[1] > 1.99
        assert radius == pytest.approx(8.0, rel=1e-5)
        far = -x * (8.0 / float(rms(x)[0])) if at > 0 else x * (8.0 / max(float(rms(x)[0]), 1e-9))
        assert max(float(rms(node.run(s * far))[0]) for s in (1, -1)) == pytest.approx(
            8.0, rel=1e-5
        )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(HALVED),
    st.booleans(),
    st.integers(1, 7),
    st.sampled_from([-1.3, 0.4, 1.0]),
    st.sampled_from([-2.0, 0.7]),
    st.sampled_from([0.0, 0.5, 5.0]),
    st.floats(0.1, 4.0),
    st.integers(0, 10**6),
)
def test_mlp_with_its_residual_holds_under_attack(
    kind: str, scaled: bool, width: int, c: float, g: float, bias: float, r: float, seed: int
) -> None:
    w1 = rand(width, 4, seed=seed)
    w2 = -w1.T.contiguous() if seed % 2 else rand(4, width, seed=seed + 1)
    biases = [bias * rand(width, seed=seed + 2), bias * rand(4, seed=seed + 3)] if bias else []
    node, norms = mlp(w1, w2, activation(kind, scaled), c, g, *biases)
    size, slope = attack(node, 4, 1, r, seed=seed)
    for radius, constant in (joint_only(node, r, norms), plain_only(node, r, norms)):
        assert size <= radius * EXACT
        assert slope <= constant * EXACT


def test_a_weakened_mlp_rule_is_exceeded() -> None:
    """The rule fails for relu without the linear half of the branch, or with half the swing."""
    eye = torch.eye(3, dtype=torch.float64)
    on = torch.full((1, 3), 1.0, dtype=torch.float64)
    node, norms = mlp(eye, eye, activation("relu"), 1.0, 1.0)
    seen = secant(node, on, on)
    assert seen == pytest.approx(2.0)
    broken = ProvenNorms(norms)
    broken.joint["m"] = replace(norms.joint["m"], linear=Decimal("1.000001"))
    assert joint_only(node, 1.0, broken)[1] < seen
    with mock.patch.object(Activation, "swing", return_value=Decimal("0.25")):
        assert joint_only(node, 1.0, norms)[1] < seen
    assert seen <= joint_only(node, 1.0, norms)[1] * EXACT


def test_the_swing_is_rounded_up_whatever_the_callers_decimal_context_says() -> None:
    with decimal.localcontext() as context:
        context.prec = 4  # `-` would give 0.6289, below the slope that gelu has
        assert activation("gelu").swing() >= Decimal("0.6289041452")


def test_a_constant_in_front_of_the_activation_is_not_measured() -> None:
    """A branch with a constant in front of a curved activation gets the plain rule.

    There x + W_2 f(2 W_1 x) is not x + 2 W_2 f(W_1 x).
    """
    eye = torch.eye(3, dtype=torch.float64)
    first, second, act = linear("up", eye), linear("down", eye), activation("gelu")
    node = MlpResidual("m", Chain("c", [first, Scale("s", 2.0), act, second]))
    assert measured(node, {"up": (first, 0), "down": (second, 0)}).joint["m"] is None


def test_a_constant_behind_the_activation_belongs_to_the_output_map_but_not_to_its_bias() -> None:
    """A constant behind the activation scales the output map and not its bias.

    OPT's branches are scaled there: x + W_2 (s f(W_1 x)) + b_2, with s far below 1.
    """
    eye, bias = (
        torch.eye(3, dtype=torch.float64),
        torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64),
    )
    first, second, act = linear("up", eye), linear("down", eye, bias), activation("relu")
    node = MlpResidual("m", Chain("c", [first, act, Scale("s", 0.01), second]))
    norms = measured(node, {"up": (first, 0), "down": (second, 0)})
    assert norms.joint["m"] is not None
    x = torch.tensor([[3**0.5, 0.0, 0.0]], dtype=torch.float64)  # RMS norm 1, along the bias
    radius, constant = joint_only(node, 1.0, norms)
    attained = float(node.run(x).square().mean().sqrt())
    assert attained == pytest.approx(radius)
    assert attained <= radius * EXACT
    assert constant == pytest.approx(1.01)


# ---- gate through its output map -----------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 4, 9])
def test_identity_gates_attain_two_roots_of_the_width(d: int) -> None:
    """The gate relu(x) * x attains slope 2 sqrt(d) and size sqrt(d).

    It does so along the first coordinate, where it is x_1^2.
    """
    eye = torch.eye(d, dtype=torch.float64)
    node, norms = gated(eye, eye, eye, activation("relu"))
    radius, constant = joint_only(node, 1.0, norms)
    x = unit(d, 0)[None] * d**0.5
    assert secant(node, x, x) == pytest.approx(2 * d**0.5)
    assert 2 * d**0.5 <= constant <= 2 * d**0.5 * TIGHT
    assert float(rms(node.run(x))[0]) <= radius <= d**0.5 * TIGHT
    with mock.patch.object(joint, "_HADAMARD_UP_TO", d - 1):
        assert node.measure(norms) is None, "too wide to square: the plain rule alone"


def test_the_gate_rule_is_attained_where_single_norms_are_ten_times_too_large() -> None:
    """The gate rule gives the 10 that is attained, where norms of single maps say 100.

    Rows are large in one map and small in the other one.
    """
    w_g, w_u = (
        torch.diag(torch.tensor(s, dtype=torch.float64)) for s in ([10.0, 1.0], [1.0, 10.0])
    )
    node, norms = gated(w_g, w_u, torch.eye(2, dtype=torch.float64), activation("relu"))
    radius, constant = joint_only(node, 1.0, norms)
    x = unit(2, 0)[None] * 2**0.5
    seen = secant(node, x, x)
    assert seen == pytest.approx(20 * 2**0.5)
    assert seen <= constant * EXACT <= seen * TIGHT
    assert float(rms(node.run(x))[0]) <= radius * EXACT
    assert plain_only(node, 1.0, norms)[1] > 9.9 * constant
    broken = ProvenNorms(norms)
    broken.joint["m"] = joint.GateNorms(norms.joint["m"].product / 2)
    assert joint_only(node, 1.0, broken)[1] < seen


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(HALVED),
    st.booleans(),
    st.integers(1, 7),
    st.sampled_from(["random", "same", "rank one", "uneven"]),
    st.sampled_from([0.0, 0.5, 5.0]),
    st.floats(0.1, 4.0),
    st.integers(0, 10**6),
)
def test_gate_through_its_output_map_holds_under_attack(
    kind: str, scaled: bool, width: int, form: str, bias: float, r: float, seed: int
) -> None:
    w_g, w_u = rand(width, 4, seed=seed), rand(width, 4, seed=seed + 1)
    w_d = rand(3, width, seed=seed + 2)
    if form == "same":
        w_u, w_d = w_g.clone(), w_g[:, :3].T.contiguous()
    elif form == "rank one":
        w_g, w_u = (w[:, :1] * unit(4, 1) for w in (w_g, w_u))
    elif form == "uneven":
        w_g[0] *= 20
        w_d[:, -1] *= 20
    biases = (
        [bias * rand(n, seed=seed + 3 + i) for i, n in enumerate((width, width, 3))] if bias else []
    )
    node, norms = gated(w_g, w_u, w_d, activation(kind, scaled), *biases)
    size, slope = attack(node, 4, 1, r, seed=seed)
    for radius, constant in (joint_only(node, r, norms), plain_only(node, r, norms)):
        assert size <= radius * EXACT
        assert slope <= constant * EXACT
