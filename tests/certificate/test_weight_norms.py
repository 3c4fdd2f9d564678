"""Each norm that a certificate speaks of holds under an attack of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lip_plugin import certify, retrofit
from lip_plugin.certificate.graph.build import build
from lip_plugin.errors import ConfigError
from lip_plugin.linalg.rows import row_distance_max_upper
from tests.support.families import FAMILIES, tiny
from tests.support.oracles import paper, randomize_

TOKENS = 6


def secants(family: str, measure) -> tuple[float, object]:
    """The largest secant that is found, and the certificate.

    A secant is `measure(difference of logits) / size(difference of inputs)`.
    """
    model = tiny(family)
    retrofit(model, paper(w_max=1.5))
    randomize_(model)
    certificate, graph = certify(model), build(model)
    d, r = certificate.d_in, certificate.radius
    x = torch.randn(8, TOKENS, d, dtype=torch.float64).requires_grad_(True)
    v = torch.randn(8, TOKENS, d, dtype=torch.float64).requires_grad_(True)
    optimizer, best, step = torch.optim.Adam([x, v], lr=0.1), 0.0, 1e-4 * r
    for _ in range(25):
        e = x / rms(x).unsqueeze(-1) * (r - step)
        ends = torch.stack([e + step * (u := v / rms(v).amax(-1)[:, None, None]), e - step * u])
        moved = graph.body.run(ends.flatten(0, 1)).unflatten(0, (2, 8))
        gains = measure(moved[0] - moved[1], ends[0] - ends[1])
        best = max(best, float(gains.detach().max()))
        x.grad, v.grad = torch.autograd.grad(-gains.log().sum(), [x, v])
        optimizer.step()
    return best, certificate


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def pairs(out: Tensor, inputs: Tensor) -> Tensor:
    return (out.amax(-1) - out.amin(-1)).amax(-1) / rms(inputs).amax(-1)


def l2(out: Tensor, inputs: Tensor) -> Tensor:
    return out.flatten(1).norm(dim=1) / inputs.flatten(1).norm(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_pair_of_logits_moves_faster_than_certified(family: str) -> None:
    lower, certificate = secants(family, pairs)
    assert 0 < lower <= certificate.logit_difference


@pytest.mark.parametrize("family", FAMILIES)
def test_l2_over_the_sequence_is_within_its_bound(family: str) -> None:
    lower, certificate = secants(family, l2)
    assert 0 < lower <= certificate.l2(TOKENS)
    assert certificate.l2(4 * TOKENS) == pytest.approx(2 * certificate.l2(TOKENS))


def test_a_linear_network_attains_all_three() -> None:
    """A linear network attains all three norms of the certificate.

    At a fresh start only the head is left. Two far rows attain the pair's bound to 0.1 %, and alike
    tokens attain the l2 bound.
    """
    model = tiny("llama")
    retrofit(model, paper())
    certificate = certify(model)
    rows = model.lm_head.weight.detach().double() * model.model.norm.scale
    residual = math.sqrt(rows.shape[1])
    far = torch.cdist(rows, rows).max() * residual  # a movement of RMS norm 1 along the difference
    assert float(far) == pytest.approx(certificate.logit_difference, rel=2e-3)
    assert float(far) <= certificate.logit_difference
    top = torch.linalg.matrix_norm(rows, 2)
    assert float(top) <= certificate.l2(1) <= float(top) * 1.002


def test_at_least_one_token() -> None:
    model = tiny("llama")
    retrofit(model, paper())
    with pytest.raises(ConfigError, match="at least 1"):
        certify(model).l2(0)


@pytest.mark.parametrize("rows", [2, 40, 9000])
def test_distances_of_rows_are_bounded_by_all_pairs_or_from_their_mean(rows: int) -> None:
    w = torch.randn(rows, 24) + 5.0
    truth = float(
        torch.cdist(w.double(), w.double(), compute_mode="donot_use_mm_for_euclid_dist").max()
    )
    upper = row_distance_max_upper(w)
    assert truth <= upper <= truth * (1 + (2e-4 if rows < 9000 else 1.0))
    assert row_distance_max_upper(torch.ones(rows, 3)) < 1e-2  # equal rows: nothing but rounding
