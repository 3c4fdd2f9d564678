"""The exact value of a product lies within the error that is stated with it.

Exact rational arithmetic is the judge.
"""

from __future__ import annotations

import decimal
import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lip_plugin.linalg import rounded as products
from lip_plugin.linalg import spectrum
from lip_plugin.linalg.rounded import Rounded
from lip_plugin.linalg.spectrum import lambda_max_upper

# sigma_max_upper of small matrices is at most 5e-7 high, by its margin of 1e-6 of lambda_max. A
# float64 SVD is off by 1e-14.
TIGHT = 1e-6
SVD = 1e-13
FEW = settings(max_examples=30, deadline=None, derandomize=True)

Exact = list[list[Fraction]]


def exact(x: Tensor) -> Exact:
    return [[Fraction(v) for v in row] for row in x.double().tolist()]


def times(a: Exact, b: Exact) -> Exact:
    columns = list(zip(*b, strict=True))
    return [
        [sum((x * y for x, y in zip(row, c, strict=True)), Fraction(0)) for c in columns]
        for row in a
    ]


def transpose(a: Exact) -> Exact:
    return [list(c) for c in zip(*a, strict=True)]


def off(rounded: Rounded, truth: Exact) -> float:
    """norm_F(true - value) / error, which is at most 1 if the error is a bound.

    The true matrix is exact.
    """
    unit = Fraction(2) ** rounded.exponent
    difference = sum(
        (t - Fraction(v) * unit) ** 2
        for row, values in zip(truth, rounded.value.tolist(), strict=True)
        for t, v in zip(row, values, strict=True)
    )
    bound = Fraction(rounded.error) * unit
    if difference == 0:
        return 0.0
    return math.sqrt(difference / bound**2) if bound else math.inf


def above(upper: Decimal, truth: Exact) -> bool:
    """Whether the exact sigma_max is at most `upper`.

    It is if upper^2 I - A^T A has no negative pivot, by an exact LDL^T.
    """
    gram = times(transpose(truth), truth)
    n, c = len(gram), Fraction(upper) ** 2
    a = [[(c if i == j else Fraction(0)) - gram[i][j] for j in range(n)] for i in range(n)]
    for k in range(n):
        if a[k][k] <= 0:
            return a[k][k] == 0 and all(a[i][j] == 0 for i in range(k, n) for j in range(k, n))
        for i in range(k + 1, n):
            factor = a[i][k] / a[k][k]
            for j in range(k, n):
                a[i][j] -= factor * a[k][j]
    return True


def rand(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * size


def scaled(x: Tensor, exponent: int) -> Tensor:
    """A number times a power of two, in two steps, because 2^1074 is no float."""
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)


dims = st.integers(1, 4)
exponents = st.sampled_from([0, 1, -3, 100, -100, 500, -500, 1000, -1000])


@FEW
@given(dims, dims, dims, dims, exponents, exponents, st.integers(0, 10**6))
def test_three_factors_are_off_by_no_more_than_the_error(
    n: int, k: int, m: int, p: int, e: int, f: int, seed: int
) -> None:
    """A product of three factors is off by no more than its error.

    Entries have all sizes between 2^-1040 and 2^1020. Norms are above the truth by rounding only.
    """
    a = scaled(rand(n, k, seed=seed).clamp(-4, 4), e)
    b = scaled(rand(k, m, seed=seed + 1), f)
    c = rand(m, p, seed=seed + 2)
    product = (Rounded.of(a) @ Rounded.of(b)) @ Rounded.of(c)
    truth = times(times(exact(a), exact(b)), exact(c))
    assert off(product, truth) <= 1
    assert above(product.norm_upper(), truth)
    frobenius = sum(v * v for row in truth for v in row)
    assert Fraction(product.size_upper()) ** 2 >= frobenius
    assert Fraction(product.size_upper()) ** 2 <= frobenius * (
        1 + Fraction(1, 10**9)
    ) or product.error > 0.01 * float(product.value.norm())


@FEW
@given(dims, dims, st.sampled_from([1e-200, 1e-30, 1.0, 1e30, 1e200]), st.integers(0, 10**6))
def test_blocks_times_factors_stay_within_their_error(
    n: int, m: int, size: float, seed: int
) -> None:
    """Blocks times factors stay within their error, whatever the size of the factors.

    Blocks [H, n, m] are multiplied and put below each other. Small sizes do not vanish in squares.
    """
    blocks = rand(3, n, m, seed=seed)
    factors = (
        rand(3, seed=seed + 1).abs() * size * torch.tensor([1.0, 1e-3, 1e3], dtype=torch.float64)
    )
    result = Rounded.of(blocks).times(factors).flat()
    truth = [
        [Fraction(f) * Fraction(v) for v in row]
        for f, block in zip(factors.tolist(), blocks.tolist(), strict=True)
        for row in block
    ]
    assert off(result, truth) <= 1
    assert above(result.norm_upper(), truth)
    frobenius = sum(v * v for row in truth for v in row)
    assert frobenius <= Fraction(result.size_upper()) ** 2 <= frobenius * (1 + Fraction(1, 10**9))


@FEW
@given(dims, dims, dims, exponents, st.integers(0, 10**6))
def test_entrywise_products_of_gram_matrices_and_their_roots(
    n: int, k: int, m: int, e: int, seed: int
) -> None:
    """The root of a product of Gram matrices is above the sigma_max that it stands for.

    sqrt(lambda_max) of (A A^T) * (B B^T) is sigma_max of the matrix of rows a_i (x) b_i, which is
    the oracle.
    """
    a, b = scaled(rand(n, k, seed=seed).clamp(-4, 4), e // 2), rand(n, m, seed=seed + 1)
    grams = [(r := Rounded.of(x)) @ r.mT for x in (a, b)]
    product = grams[0].entrywise(grams[1])
    left, right = (times(x, transpose(x)) for x in (exact(a), exact(b)))
    truth = [[x * y for x, y in zip(r, s, strict=True)] for r, s in zip(left, right, strict=True)]
    assert off(product, truth) <= 1
    rows = [[x * y for x in r for y in s] for r, s in zip(exact(a), exact(b), strict=True)]
    upper = product.gram_norm_upper()
    assert above(upper, transpose(rows))
    assert not above(upper * Decimal(1 - TIGHT), transpose(rows))


@FEW
@given(dims, st.sampled_from([-2.0, -0.5, 1e-3, 7.0]), exponents, st.integers(0, 10**6))
def test_identity_plus_a_product(n: int, factor: float, e: int, seed: int) -> None:
    """The identity plus a product stays within its error.

    factor * a b is near the identity, far from it, or exactly -I, where all but rounding cancels.
    """
    a = scaled(rand(n, n, seed=seed).clamp(-4, 4), e)
    result = (Rounded.of(a) @ Rounded.of(torch.eye(n))).plus_identity(factor)
    truth = [
        [Fraction(factor) * v + (i == j) for j, v in enumerate(row)]
        for i, row in enumerate(exact(a))
    ]
    assert off(result, truth) <= 1
    assert above(result.norm_upper(), truth)
    gone = Rounded.of(torch.eye(n)).plus_identity(-1.0)
    assert 0 <= float(gone.norm_upper()) < 1e-13


def test_numbers_beyond_float64_are_infinite_or_carried_never_zero() -> None:
    big, small = (torch.full((3, 3), s, dtype=torch.float64) for s in (1e300, 1e-300))
    square = Rounded.of(big) @ Rounded.of(big)
    assert square.norm_upper() / Decimal("9e600") == pytest.approx(1, rel=TIGHT)
    assert square.plus_identity(0.5).norm_upper() == Decimal("Infinity")
    square = Rounded.of(small) @ Rounded.of(small)
    assert square.norm_upper() / Decimal("9e-600") == pytest.approx(1, rel=TIGHT)
    assert square.norm_upper() >= Decimal("9e-600") * (1 - Decimal("1e-14"))
    assert float(square.plus_identity(0.5).norm_upper()) == pytest.approx(1, rel=TIGHT)
    least = torch.full((2, 1), 5e-324, dtype=torch.float64)
    assert Rounded.of(least).size_upper() ** 2 >= 2 * Decimal(5e-324) ** 2
    for broken in (math.inf, math.nan):
        factors = torch.tensor([broken], dtype=torch.float64)
        spoilt = Rounded.of(torch.ones(1, 2, 2)).times(factors).flat()
        assert (
            spoilt.norm_upper()
            == spoilt.gram_norm_upper()
            == spoilt.size_upper()
            == Decimal("Infinity")
        )


def test_zero_matrices_stay_below_everything_that_matters() -> None:
    zero = Rounded.of(torch.zeros(3, 3))
    assert zero.norm_upper() == zero.size_upper() == 0
    product = zero @ Rounded.of(torch.ones(3, 3))
    for upper in (product.norm_upper(), product.gram_norm_upper(), product.size_upper()):
        assert 0 <= upper < Decimal("1e-140")
    assert zero.plus_identity(5.0).norm_upper() >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_weights_are_taken_exactly_whatever_autocast_says(dtype: torch.dtype) -> None:
    w = torch.randn(6, 5).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = Rounded.of(w) @ Rounded.of(w).mT
    assert off(product, times(exact(w), transpose(exact(w)))) <= 1
    assert product.error < 1e-13 * float(product.value.norm())


def test_the_callers_decimal_context_does_not_round_a_bound_down() -> None:
    """Five digits, rounded down, would make 1.23456789 less than it is."""
    w = torch.tensor([[1.23456789]], dtype=torch.float64)
    with decimal.localcontext() as context:
        context.prec, context.rounding = 5, decimal.ROUND_DOWN
        upper = Rounded.of(w).norm_upper()
    assert upper >= Decimal(1.23456789)


@pytest.mark.parametrize("shape", [(40, 64), (160, 96), (150, 300)])
def test_larger_products_are_above_the_svd_and_tight(shape: tuple[int, int]) -> None:
    """Larger products are above the SVD and tight.

    Their norm is far below the product of the norms. From n = 129 on, the guess comes from Lanczos.
    """
    n, k = shape
    u = torch.linalg.qr(rand(k, k, seed=1)).Q
    a = rand(n, k, seed=2) * torch.linspace(3, 0, k).double() @ u.T
    b = u @ (torch.linspace(0, 3, k).double()[:, None] * rand(k, n, seed=3))
    product = Rounded.of(a) @ Rounded.of(b)
    truth = float(torch.linalg.matrix_norm(a @ b, 2))
    assert truth * (1 - SVD) <= float(product.norm_upper()) <= truth * 1.001
    gram = product @ product.mT
    assert truth * (1 - SVD) <= float(gram.gram_norm_upper()) <= truth * 1.001


def test_an_error_that_is_left_out_is_seen() -> None:
    """Without the rounding error, or with a tenth of it, the truth lies outside.

    The sum cancels.
    """
    a = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0], [2.0**-53], [2.0**-53]], dtype=torch.float64)
    product = Rounded.of(a) @ Rounded.of(b)
    truth = times(exact(a), exact(b))
    assert 0 < off(product, truth) <= 1
    assert off(Rounded(product.value, 0.0, product.exponent), truth) == math.inf
    small = Rounded(product.value, product.error / 100, product.exponent)
    assert off(small, truth) > 1


# ---- lambda_max_upper ----------------------------------------------------------------------------


@pytest.mark.parametrize("guess", [1e-6, 0.5, 1.0 - 1e-9, 30.0])
def test_every_way_to_bound_an_eigenvalue_is_above_it(
    guess: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to bound an eigenvalue is above it, whatever the guess.

    The guess is too low by far, too low by little, or too high. Fallbacks prove what it could not.
    """
    batch = torch.stack([rand(24, 24, seed=s) for s in range(4)])
    batch[3] = torch.eye(24)
    batch = batch @ batch.mT
    truth = torch.linalg.eigvalsh(batch)[:, -1]

    def wrong(g: Tensor) -> tuple[Tensor, Tensor]:
        top = torch.linalg.eigvalsh(g)[:, -1]
        return top * guess, torch.zeros_like(top)

    monkeypatch.setattr(spectrum, "lambda_max_guess", wrong)
    for never in (False, True):
        if never:  # Cholesky fails for every c: Gram iteration is left
            monkeypatch.setattr(
                spectrum,
                "proven_lambda_max",
                lambda g, c, slack: (c, torch.zeros_like(c, dtype=torch.bool)),
            )
        upper = lambda_max_upper(batch, torch.zeros(4, dtype=torch.float64))
        assert bool((upper >= truth * (1 - SVD)).all())
        # 12 rounds of Gram iteration: n^(1 / 2^13) = 4e-4; a guess that is too high is believed
        assert bool((upper <= truth * 1.002 * max(1.0, guess)).all())


def test_matrices_that_are_nothing_but_rounding_get_their_slack() -> None:
    """A matrix that is nothing but rounding gets norm_F and the slack, never zero.

    A product that cancels may have a trace of zero or below.
    """
    g = torch.tensor([[-1e-17, 3e-17], [3e-17, -1e-17]], dtype=torch.float64)
    slack = torch.tensor([1e-16], dtype=torch.float64)
    upper = lambda_max_upper(g[None], slack)
    assert float(upper) >= 2e-17 + 1e-16
    rounded = Rounded(g, 1e-16, 0)
    assert float(rounded.gram_norm_upper()) >= math.sqrt(1.2e-16)
    mixed = torch.stack([g, torch.eye(2, dtype=torch.float64)])
    both = lambda_max_upper(mixed, slack.expand(2))
    assert float(both[0]) == pytest.approx(float(upper))
    assert 1 <= float(both[1]) < 1 + 2 * TIGHT


def test_negative_diagonals_within_the_error_are_covered() -> None:
    """Negative diagonals within the error are covered.

    The true matrix is diag(1, 0), stored with -error on the diagonal. The bound is above 1 all the
    same.
    """
    error = 1e-3
    stored = torch.diag(torch.tensor([1 - error / 2, -error / 2], dtype=torch.float64))
    upper = float(Rounded(stored, error, 0).gram_norm_upper())
    assert 1.0 <= upper <= 1 + error


def test_the_underflow_that_is_allowed_for_is_above_what_can_happen() -> None:
    """The underflow that is allowed for is above what can happen, for n = 10^6.

    There are n x n entries of n products each, every one off by half of 2^-1074 in two steps.
    """
    assert products._UNDERFLOW > 1e6 * 1e6 * 2.0**-1074
