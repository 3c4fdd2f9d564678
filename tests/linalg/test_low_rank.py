"""LowRankProblem agrees with dense matrices in float64.

The test of a block is exact, and regula falsi finds the multiplier.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lip_plugin.linalg import low_rank
from lip_plugin.linalg.low_rank import LowRankProblem

SHAPES = [(12, 20, 3), (12, 20, 1), (8, 40, 12), (20, 12, 3), (30, 8, 8)]


def problem(
    shape: tuple[int, int, int], size: float, room: float, blocks: int = 5
) -> tuple[LowRankProblem, Tensor, Tensor]:
    """A problem of random blocks with norm(W0) = 1 - room and cap 1.

    Gives the problem, S [b, n, n] and Z [b, n, k]. Blocks are changed by about `size`.
    """
    d_out, d_in, k = shape
    w = torch.randn(blocks, d_out, d_in, dtype=torch.float64)
    w = w * ((1.0 - room) / torch.linalg.matrix_norm(w, 2))[:, None, None]
    q = torch.linalg.qr(torch.randn(blocks, d_in, k, dtype=torch.float64))[0]
    y = w @ q
    e = torch.randn(blocks, d_out, k, dtype=torch.float64)
    z = y + e * (size / torch.linalg.matrix_norm(e, 2))[:, None, None]
    x, tall = torch.cat([y, z], -1), d_out > d_in
    energy, basis = torch.linalg.eigh(w.mT @ w if tall else w @ w.mT)
    hat = basis.mT @ (w.mT @ x if tall else x)
    ceiling = torch.ones(blocks, dtype=torch.float64)
    s = torch.eye(d_out, dtype=torch.float64) - w @ w.mT + y @ y.mT
    return LowRankProblem(hat, x.mT @ x, energy, ceiling, tall), s, z


def dense_top(s: Tensor, z: Tensor, shift: Tensor) -> Tensor:
    shifted = s + shift[:, None, None] * torch.eye(s.shape[-1], dtype=s.dtype)
    moved = s @ torch.linalg.solve(shifted, z)
    return torch.linalg.eigvalsh(moved.mT @ torch.linalg.solve(s, moved))[:, -1]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_test_is_what_dense_matrices_say(shape: tuple[int, int, int]) -> None:
    p, s, z = problem(shape, 0.7, 0.05)
    zero, some = torch.zeros(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    assert torch.allclose(p.solve()[0], dense_top(s, z, zero), rtol=1e-9)
    assert torch.allclose(p.solve(some)[0], dense_top(s, z, some), rtol=1e-9)
    assert torch.allclose(p.solve(zero)[0], p.solve()[0], rtol=1e-12)
    root = torch.linalg.matrix_norm(
        z, 2
    )  # what passes has norm(Z) <= 1: W_perp W_perp^T only adds to Z Z^T
    assert bool(((p.solve()[0] > 1) | (root <= 1 + 1e-9)).all())


@pytest.mark.parametrize("room", [0.3, 1e-2, 1e-5])
@pytest.mark.parametrize("size", [1e-3, 0.5, 30.0, 900.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_multiplier_is_feasible_and_near_the_least(
    shape: tuple[int, int, int], size: float, room: float
) -> None:
    p, s, z = problem(shape, size, room)
    top = p.solve()[0]
    above = (top > 1.0 + 1e-4).nonzero()[:, 0]
    if len(above) == 0:
        assert size < 1
        return
    shift, g = p[above].least_shift(top[above])
    at = dense_top(s[above], z[above], shift)
    assert float(at.max()) <= 1.0 + 1e-7, "S is inverted to 1e-5 of the room, and squared"
    lower = dense_top(s[above], z[above], shift * (1.0 - 2 * low_rank._NEAR))
    near = (at >= 1.0 - low_rank._NEAR) | (lower > 1.0)
    assert bool(near.all()), (at, lower)
    assert torch.allclose(g, p[above].solve(shift)[1], rtol=1e-6, atol=1e-9)


def test_few_evaluations_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    count, solve = [0], LowRankProblem.solve

    def counted(self: LowRankProblem, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count[0] += 1
        return solve(self, shift)

    problems = [
        problem(shape, size, room)
        for shape in SHAPES
        for size in (0.1, 1.0)
        for room in (0.1, 1e-3)
    ]
    monkeypatch.setattr(LowRankProblem, "solve", counted)
    used = []
    for p, _, _ in problems:
        top = p.solve()[0]
        above = (top > 1.0 + 1e-4).nonzero()[:, 0]
        if len(above):
            before = count[0]
            p[above].least_shift(top[above])
            used.append(count[0] - before)
    assert max(used) <= low_rank._FALSI + 1
    assert sum(used) / len(used) <= 8, used


def test_a_block_that_is_done_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is done waits for the others.

    Its T is 1 to the last bit on both sides, where the interpolation is 0 / 0. The other block
    takes long.
    """
    p, _, _ = problem((12, 20, 3), 30.0, 0.3, blocks=2)
    asked: list[Tensor] = []

    def solve(self: LowRankProblem, shift: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(shift)
        easy = 1.0 + 2.0**-52 if float(shift[0]) < 1.0 else 1.0
        hard = (
            1e9 if float(shift[1]) < 3e-7 else 0.5
        )  # a cliff: falsi does not see it, bisection does
        top = torch.tensor([easy, hard], dtype=torch.float64)
        return top, torch.zeros(2, 6, 3, dtype=torch.float64)

    monkeypatch.setattr(LowRankProblem, "solve", solve)
    shift, _ = p.least_shift(torch.tensor([1.0 + 2.0**-52, 1e9], dtype=torch.float64))
    assert all(bool(torch.isfinite(s).all()) for s in asked)
    assert float(shift[0]) >= 1.0
    assert 3e-7 <= float(shift[1]) <= 3e-7 * 1.05
