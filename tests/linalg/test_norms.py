"""Proven norms enclose the float64 SVD, upper >= truth >= lower, whatever the spectrum."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lip_plugin.errors import ConfigError, NonFiniteError
from lip_plugin.linalg import norms, spectrum
from lip_plugin.linalg.norms import (
    rms_norm,
    rms_to_rms_exact,
    rms_to_rms_lower,
    rms_to_rms_upper,
    row_rms_max_upper,
    sigma_max_exact,
    sigma_max_lower,
    sigma_max_upper,
    sigma_max_upper_gram,
    sigma_max_within,
    sum_rms_max_upper,
)
from tests.support.oracles import orthonormal

ORACLE = 1e-13  # relative error of a float64 SVD of at most 512 x 2048 (about n u, measured 1e-14)
TIGHT = 1e-3  # the promise: within 0.1 % of the truth
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def with_spectrum(d_out: int, d_in: int, s: torch.Tensor, seed: int = 0) -> torch.Tensor:
    n = len(s)
    return (orthonormal(d_out, n, seed) * s.double()) @ orthonormal(d_in, n, seed + 1).T


def spectra(n: int) -> dict[str, torch.Tensor]:
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    return {
        "flat": torch.ones(n),
        "clustered at the top": torch.where(ramp < 0.5, 0.3 * ramp, 0.98 + 0.02 * ramp),
        "dense edge": (1 - ramp**1.5).flip(0),
        "soft-capped": torch.sin(ramp * math.pi / 2),
        "one outlier": torch.where(ramp < 1, 0.5 * ramp, 7.0),
        "two equal tops": torch.where(ramp > 1 - 1.5 / n, 1.0, 0.9 * ramp),
        "rank one": (ramp == 1).double(),
        "rank deficient": torch.where(ramp < 0.7, 0.0, ramp),
        "decaying": torch.logspace(0, -12, n, dtype=torch.float64),
    }


def assert_bounds(w: torch.Tensor) -> None:
    truth = sigma_max_exact(w)
    for upper in (sigma_max_upper(w), sigma_max_upper_gram(w)):
        assert upper.dtype == torch.float64
        assert upper.shape == w.shape[:-2]
        assert (upper >= truth * (1 - ORACLE)).all()
        assert (upper <= truth * (1 + TIGHT)).all()
    assert (sigma_max_lower(w) <= truth * (1 + ORACLE)).all()


@pytest.mark.parametrize("name", spectra(8))
@pytest.mark.parametrize("shape", [(192, 192), (64, 768), (768, 64)])
def test_upper_and_lower_enclose_the_truth_for_adversarial_spectra(name, shape):
    w = with_spectrum(*shape, spectra(min(shape))[name])
    for scale in (1.0, 1e-30, 1e30):
        assert_bounds(w * scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_converted_exactly(dtype):
    w = torch.randn(3, 2, 20, 30).to(dtype)
    assert_bounds(w)
    assert torch.equal(sigma_max_upper(w), sigma_max_upper(w.double().to(dtype)))


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e300, 1e-40])
def test_float64_and_float32_ends_of_range_neither_overflow_nor_vanish(scale):
    w = torch.randn(12, 9, dtype=torch.float64).clamp(-3, 3) * scale
    truth = sigma_max_exact(w)
    assert (sigma_max_upper(w) >= truth * (1 - ORACLE)).all()
    # at 5e-324 the answer itself is rounded to whole units of 5e-324
    assert (sigma_max_upper(w) <= truth * (1 + TIGHT) + 1e-323).all()
    if scale == 1e-40:
        assert_bounds(w.float())


def test_large_matrices_take_the_blocked_gram_and_stay_enclosed():
    w = torch.stack([torch.randn(385, 400), 1e-3 * torch.randn(385, 400)])
    assert_bounds(w.mT)


def test_chunked_conversion_gives_the_same_bound(monkeypatch):
    for w in (torch.randn(5, 16, 24), torch.randn(5, 16, 24, dtype=torch.float64) * 1e200):
        whole = sigma_max_upper(w)
        monkeypatch.setattr(norms, "_CHUNK", 2 * 16 * 24)
        # other batch sizes may sum in another order: 1e-12, both are proven bounds
        torch.testing.assert_close(sigma_max_upper(w), whole, rtol=1e-12, atol=0.0)
        monkeypatch.undo()


@settings(deadline=None, max_examples=40)
@given(
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
    exponent=st.integers(-40, 40),
    seed=st.integers(0, 10**6),
    rank=st.integers(0, 12),
)
def test_upper_is_never_below_and_lower_never_above(d_out, d_in, exponent, seed, rank):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(2, d_out, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(2, rank, d_in, generator=generator, dtype=torch.float64)
    assert_bounds(left @ right * 10.0**exponent)


def test_the_fallbacks_are_proven_too_when_the_estimate_is_useless(monkeypatch):
    w = torch.stack([with_spectrum(48, 48, s) for s in spectra(48).values()])

    def useless(g):
        return torch.full((len(g),), 1e-3, dtype=torch.float64), torch.zeros(
            len(g), dtype=torch.float64
        )

    monkeypatch.setattr(spectrum, "lambda_max_guess", useless)
    assert_bounds(w)


def test_gram_iteration_is_within_its_stated_factor_at_every_number_of_rounds():
    w = orthonormal(256, 256, 3)  # the worst case: a flat spectrum attains n^(1 / 2^(rounds + 2))
    for rounds in (0, 2, 8, 10, 12):
        excess = float(sigma_max_upper_gram(w, rounds)) / 256 ** (2.0 ** -(rounds + 2))
        assert excess == pytest.approx(1.0, abs=1e-9)
    assert float(sigma_max_upper_gram(torch.randn(256, 256), 8)) > 0
    g = torch.randn(256, 512)
    assert float(sigma_max_upper_gram(g, 8) / sigma_max_exact(g)) < 1 + TIGHT


def test_within_says_yes_only_where_it_is_true_and_is_sharp_to_1e_8():
    w = torch.stack([with_spectrum(40, 70, s) for s in spectra(40).values()])
    truth = sigma_max_exact(w)
    assert sigma_max_within(w, truth * (1 + 1e-8)).all()
    assert not sigma_max_within(w, truth * (1 - ORACLE)).any()
    assert sigma_max_within(w, torch.full_like(truth, math.inf)).all()
    assert sigma_max_within(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.float64)).all()


def test_lower_is_attained_and_converges_where_there_is_a_gap():
    w = with_spectrum(60, 30, spectra(30)["one outlier"])
    # (0.5 / 7)^40 is far below rounding, so only the subtracted rounding is left
    assert float(sigma_max_lower(w)) == pytest.approx(7.0, rel=1e-12)
    again = sigma_max_lower(w, generator=torch.Generator().manual_seed(5))
    assert float(again) <= 7.0 * (1 + ORACLE)


@pytest.mark.parametrize(
    "norm",
    [sigma_max_exact, sigma_max_upper, sigma_max_upper_gram, sigma_max_lower, row_rms_max_upper],
)
class TestEdges:
    def test_zero_blocks_are_exactly_zero_beside_others(self, norm):
        w = torch.zeros(3, 5, 7)
        w[1] = 1.0
        result = norm(w)
        assert result[0] == 0
        assert result[2] == 0
        assert result[1] > 0

    @pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0), (0, 0)])
    def test_empty_batches_and_dimensions_are_defined(self, norm, shape):
        result = norm(torch.zeros(shape))
        assert result.shape == shape[:-2]
        assert (result == 0).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_non_finite_blocks_are_counted_and_refused(self, norm, bad, dtype):
        w = torch.ones(4, 5, 6, dtype=dtype)
        w[1, 2, 3] = bad
        w[3, 0, 0] = bad
        with pytest.raises(NonFiniteError, match="2 of 4"):
            norm(w)

    def test_integers_and_vectors_are_refused(self, norm):
        with pytest.raises(ConfigError):
            norm(torch.ones(3, 3, dtype=torch.int64))
        with pytest.raises(ConfigError):
            norm(torch.ones(3))


def test_rms_to_rms_is_sigma_times_the_root_of_the_aspect():
    w = torch.randn(2, 30, 50)
    truth = sigma_max_exact(w) * math.sqrt(50 / 30)
    torch.testing.assert_close(rms_to_rms_exact(w), truth, rtol=1e-15, atol=0.0)
    assert (rms_to_rms_upper(w) >= truth).all()
    assert (rms_to_rms_lower(w) <= truth).all()
    # an isometry keeps RMS norms up to the aspect: a tall orthonormal matrix has sigma_max 1
    tall = orthonormal(8, 2, 1)
    assert float(rms_to_rms_exact(tall)) == pytest.approx(0.5, rel=1e-14)


def test_rms_norm_of_ones_is_one_and_of_nothing_zero():
    assert torch.equal(rms_norm(torch.ones(3, 7)), torch.ones(3, dtype=torch.float64))
    assert torch.equal(rms_norm(torch.ones(3, 0)), torch.zeros(3, dtype=torch.float64))
    assert rms_norm(torch.ones(3, 7), dim=0).shape == (7,)


def test_row_bound_is_above_each_row_by_rounding_only():
    w = torch.randn(4, 11, 1000)
    truth = rms_norm(w).amax(-1)
    upper = row_rms_max_upper(w)
    assert (upper >= truth).all()
    assert (upper <= truth * (1 + 1e-12)).all()  # gamma_1008 = 1.1e-13


def largest_sum(tables: list[torch.Tensor]) -> Fraction:
    """The square of the largest RMS norm of a sum of rows, one from each table.

    All sums are tried, exactly.
    """
    exact = [[[Fraction(v) for v in row] for row in t.double().tolist()] for t in tables]
    sums = (
        [sum(entries, Fraction(0)) for entries in zip(*rows, strict=True)]
        for rows in product(*exact)
    )
    return max(sum((v * v for v in row), Fraction(0)) / len(row) for row in sums)


def assert_sum_bound(tables: list[torch.Tensor], tight: float | None = 1e-12) -> None:
    """The bound is never below the exact truth.

    For one or two tables it is above by the rounding of sums of d squares.
    """
    truth, upper = largest_sum(tables), Fraction(sum_rms_max_upper(tables)) ** 2
    assert upper >= truth
    if tight is not None:
        assert upper <= truth * (1 + Fraction(tight)) ** 2


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    d=st.integers(1, 7),
    sizes=st.lists(st.sampled_from([1.0, 1e-3, 1e-30, 1e30]), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_sums_of_rows_are_bounded_as_if_all_were_compared(rows, d, sizes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    tables = [
        (torch.randn(n, d, generator=generator, dtype=torch.float64) * size).to(dtype)
        for n, size in zip(rows, sizes, strict=False)
    ]
    # more tables in float64 may cancel after their sum was rounded: then it is no longer relative
    assert_sum_bound(tables, 1e-12 if len(tables) <= 2 else None)
    opposite = [*tables, -tables[0]]
    assert_sum_bound(opposite, None)


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-160, 1e160, 1e307])
def test_sums_of_rows_at_the_ends_of_float64(scale):
    tables = [torch.randn(n, 3, dtype=torch.float64).clamp(-3, 3) * scale for n in (2, 4)]
    # in units of 5e-324 the bound itself may only be rounded to the nearest one
    assert sum_rms_max_upper(tables) >= math.sqrt(
        largest_sum([t / scale for t in tables])
    ) * scale * (1 - 1e-14)
    assert math.isfinite(sum_rms_max_upper(tables))


def test_sums_of_rows_beat_the_sum_of_norms_where_no_pair_lines_up():
    a, b = torch.eye(6)[:2], torch.eye(6)[2:] * 3
    assert sum_rms_max_upper([a, b]) == pytest.approx(math.sqrt(10 / 6), rel=1e-12)
    assert sum_rms_max_upper([a, -a[:1]]) == pytest.approx(math.sqrt(2 / 6), rel=1e-12)
    assert (
        sum_rms_max_upper([a[:1], -a[:1]]) < 1e-7
    )  # cancels: what rounding may have hidden is left
    assert sum_rms_max_upper([torch.zeros(2, 6), torch.zeros(3, 6)]) == 0
    assert sum_rms_max_upper([]) == 0


def test_sums_of_rows_are_float64_whatever_autocast_and_tf32_say():
    """Sums of rows are in float64, whatever autocast and TF32 say.

    Products in bf16 were 5e-4 too low for one row of 1 + 2^-9 twice, where bf16 has 1.
    """
    row = torch.full((1, 8), 1 + 2.0**-9)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_sum_bound([row, row])
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("order", sorted(set(permutations([1e10, 1 + 5e-7, -1e10, 1.0]))))
def test_sums_of_four_tables_carry_the_rounding_of_sums_that_cancel(order):
    """Sums of four tables carry the rounding of sums that cancel.

    1e10 + x - 1e10 keeps six digits of x, and what the sum of tables lost is added again.
    """
    assert_sum_bound([torch.tensor([[x]], dtype=torch.float64) for x in order], None)


def test_more_tables_than_can_be_added_up_are_bounded_by_their_norms(monkeypatch):
    tables = [torch.randn(n, 5) for n in (3, 4, 5)]
    exact = sum_rms_max_upper(tables)
    monkeypatch.setattr(norms, "_ROWS_ADDED", 11)
    assert sum_rms_max_upper(tables) == pytest.approx(
        sum(float(row_rms_max_upper(t)) for t in tables)
    )
    assert exact <= sum_rms_max_upper(tables)
    monkeypatch.setattr(norms, "_ROWS", 2)  # compared two rows at a time, the last one alone
    assert_sum_bound(tables[1:])


def test_sums_of_rows_refuse_what_is_not_finite():
    with pytest.raises(NonFiniteError):
        sum_rms_max_upper([torch.ones(2, 3), torch.tensor([[1.0, math.nan, 0.0]])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_very_long_matrices_are_bounded_piece_by_piece(dtype, monkeypatch):
    """Very long matrices are bounded piece by piece.

    A head's Gram matrix is summed over pieces of its rows, so that it is never all in float64 at
    once.
    """
    import lip_plugin.linalg.norms as norms

    w = (torch.randn(2, 1000, 40, dtype=torch.float64) * 1e-160).to(dtype)
    if dtype != torch.float64:
        w = torch.randn(2, 1000, 40).to(dtype)
    whole = norms.sigma_max_upper(w)
    monkeypatch.setattr(norms, "_CHUNK", 2000)  # pieces of 100 to 200 rows
    for matrix in (w, w.mT):
        upper, truth = norms.sigma_max_upper(matrix), norms.sigma_max_exact(matrix)
        assert bool((upper >= truth * (1 - 1e-13)).all())  # 1e-13: rounding of the oracle's own SVD
        assert bool((upper <= truth * 1.001).all())
        assert torch.allclose(upper, whole, rtol=1e-6, atol=0.0)
