"""The price of kinks is above what they take from a margin, and near it.

Brute force knows what they take. The price is one-sided, for a reason that a test shows.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lip_plugin import attacked_accuracy, certified_accuracy, project_, retrofit
from lip_plugin.certificate.robustness.kinks import Kinks
from tests.support.families import inputs_for, tiny
from tests.support.oracles import paper, rand, randomize_


def kinks(away: Tensor, reach: Tensor, total: float, factor: float = 2.0) -> Kinks:
    """One token whose entries move within `reach`, and within 2-norm `total` together."""
    size = torch.ones(1, 1, 1, dtype=torch.float64)
    return Kinks(away[None, None], (size,), (reach,), total * size, factor)


def loss(g: Tensor, z: Tensor, d: Tensor) -> Tensor:
    """-(g . (abs(z + d) - abs(z) - sign(z) d)): what a margin loses by the kinks. [...]"""
    return -(g * ((z + d).abs() - z.abs() - z.sign() * d)).sum(-1)


def brute(g: Tensor, z: Tensor, reach: Tensor, total: float) -> float:
    """The largest loss over all subsets of crossing entries.

    The sizes of each subset are filled like water, by bisection on the budget.
    """
    best = 0.0
    harmful = [i for i in range(len(z)) if g[i] < 0]
    for size in range(1, len(harmful) + 1):
        for subset in itertools.combinations(harmful, size):
            i = torch.tensor(subset)
            low, high = 1e-9, 1e9
            for _ in range(80):
                rate = (low * high) ** 0.5
                d = torch.minimum(reach[i], -g[i] / rate)
                low, high = (rate, high) if float(d.norm()) > total else (low, rate)
            d = torch.zeros_like(z)
            d[i] = -z[i].sign() * torch.minimum(reach[i], -g[i] / high)
            assert float(d.norm()) <= total * (1 + 1e-9)
            best = max(best, float(loss(g, z, d)))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_price_is_above_everything_that_can_happen_and_near_it(seed: int) -> None:
    n = 2 + seed % 6
    z, g = rand(n, seed=seed), rand(n, seed=seed + 100)
    reach = rand(n, seed=seed + 200).abs() * 2 + 0.1
    total = float(rand(1, seed=seed + 300).abs()) * 2 + 0.05
    price = float(kinks(z.abs(), reach, total).price(g[None, None])[0, 0, 0])
    found = brute(g, z, reach, total)
    d = rand(4000, n, seed=seed + 400)
    d = torch.maximum(torch.minimum(d * 2, reach), -reach)
    d = d * (total / d.norm(dim=-1, keepdim=True)).clamp_max(1.0)
    # 1e-12: rounding of the loss itself, where nothing harms and the price is 0
    assert float(loss(g, z, d).amax()) <= price + 1e-12
    assert found <= price + 1e-12
    # a grid of prices a factor of two apart, and a duality gap of one entry in a few
    assert price <= 2.5 * found + 0.5 * float((-g).clamp_min(0).norm()) * total


def test_many_entries_leave_no_gap_worth_naming() -> None:
    """Of 256 entries the gap is that of one entry and a few per cent for the grid."""
    z, g = rand(256, seed=1), rand(256, seed=2)
    for total in (0.1, 0.5, 2.0):
        reach = torch.full_like(z, total)
        price = float(kinks(z.abs(), reach, total).price(g[None, None])[0, 0, 0])
        # A feasible movement: the best of the Lagrangian for its multiplier, shrunk to the budget.
        best = 0.0
        for rate in torch.logspace(-2, 3, 300, dtype=torch.float64):
            c = 2 * (-g).clamp_min(0)
            d = torch.minimum(reach, c / (2 * rate))
            d = torch.where(c * (d - z.abs()) > rate * d * d, d, 0.0)
            d = -z.sign() * d
            d = d * min(1.0, total / max(float(d.norm()), 1e-300))
            best = max(best, float(loss(g, z, d)))
        assert best <= price <= 1.25 * best, total
        assert price <= 0.5 * 2 * float(g.norm()) * total  # what norms alone would say is far above


def test_entries_that_help_are_free_and_those_that_harm_are_not() -> None:
    """Of a convex function only the entries that can lose are priced.

    With g > 0 the linearization of abs is below it, with g < 0 above. A wrong sign would miss that.
    """
    z, reach = torch.tensor([0.1, -0.2], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    g = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert float(kinks(z.abs(), reach, 1.0).price(g[None, None]).sum()) <= 1e-3
    harmed = float(kinks(z.abs(), reach, 1.0).price(-g[None, None]).sum())
    d = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert float(loss(-g, z, d)) == pytest.approx(2 * 2 * 0.8)
    assert harmed >= 3.2


def test_tokens_without_gradient_cost_nothing_and_eps_join_in_order() -> None:
    parts = [
        Kinks(
            torch.rand(1, 3, 4).double(),
            (s := torch.full((1, 1, 3), e).double(),),
            (torch.ones(4).double(),),
            s,
            1.0,
        )
        for e in (0.5, 1.0, 2.0)
    ]
    whole = parts[0].joined([Kinks(parts[0].at, p.sizes, p.norms, p.total, 1.0) for p in parts[1:]])
    g = torch.zeros(1, 3, 4, dtype=torch.float64)
    g[:, 1] = -1.0
    price = whole.price(g)
    assert price.shape == (3, 1, 3)
    assert not price[:, :, 0].any()
    assert not price[:, :, 2].any()
    assert bool((price[1:, 0, 1] > price[:-1, 0, 1]).all())


def robust_model(activation: str | None, seed: int = 3, w_max: float = 1.0):
    model = tiny("gpt2")
    config = {
        "position_bias": "learned",
        "attention_scale": 0,
        "activation": activation,
        "residual": (0.5, 0.8),
    }
    retrofit(model, paper(**config, w_max=w_max, value_scale=1.0, biases="drop"))
    randomize_(model, seed)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    project_(model)
    return model


def own_labels(model, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        predicted = model.double()(x).logits.argmax(-1)
    return {"input_ids": x, "labels": torch.cat([x[:, :1], predicted[:, :-1]], 1)}


GRID = (1e-3, 3e-3, 6e-3, 1e-2, 2e-2, 3e-2, 5e-2, 7e-2, 0.1, 0.15, 0.3, 1.0, 3.0)


@pytest.mark.parametrize("activation", ["abs", None])
@pytest.mark.parametrize("seed", range(4))
def test_certified_never_exceeds_attacked_by_position_alone(
    activation: str | None, seed: int
) -> None:
    model = robust_model(activation, seed)
    batch = own_labels(model, inputs_for("gpt2", batch=4, tokens=10))
    certified = certified_accuracy(model, [batch], GRID, refine=67)  # every pair by its gradient
    attacked = attacked_accuracy(model, [batch], GRID, restarts=3, steps=15)
    assert bool((certified.right <= attacked.right).all())
    assert certified.accuracy[1] > 0.3  # not vacuous
    assert attacked.accuracy[-1] < 0.7


def test_prices_of_kinks_raise_what_is_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    model = robust_model("abs", w_max=2.0)
    batch = own_labels(model, inputs_for("gpt2", batch=4, tokens=10))
    priced = certified_accuracy(model, [batch], GRID)
    monkeypatch.setattr(
        Kinks, "price", lambda self, gradient: torch.full_like(self.total, float("inf"))
    )
    plain = certified_accuracy(model, [batch], GRID)
    assert bool((plain.right <= priced.right).all())
    assert sum(plain.accuracy) < sum(priced.accuracy)
