"""Orthogonalize never gives a norm above 1, and stays inside the proven range.

This holds for any spectrum, scale and dtype.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lip_plugin.errors import ConfigError, NonFiniteError
from lip_plugin.linalg import polar
from lip_plugin.linalg.polar import (
    _POLAR_EXPRESS_RAW,
    TABLES,
    orthogonalize,
    output_range,
    quintic_range,
)

# After division by the range and by 1 + 1e-5, float32 has 1e-5 to spare. What is asserted is the
# promise.
ABOVE_ONE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}


def singular_values(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(x.double())


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(d_out: int, d_in: int, s: torch.Tensor) -> torch.Tensor:
    return (orthonormal(d_out, len(s), 1) * s.double()) @ orthonormal(d_in, len(s), 2).T


def apply_quintics(name: str, steps: int, x: torch.Tensor, lift: float = 0.0) -> torch.Tensor:
    for a, b, c in TABLES[name].first(steps):
        x = x * (1 + lift)
        x = x * (a + x**2 * (b + c * x**2))
    return x


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("steps", [1, 3, 5, 6, 8, 10])
@pytest.mark.parametrize("lift", [0.0, 1e-3, 1e-2])
def test_output_ranges_contain_a_dense_grid_even_if_rounding_lifts_every_step(name, steps, lift):
    lo, hi = output_range(name, steps)
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    out = apply_quintics(name, steps, grid, lift)
    assert out.max() <= hi
    assert out.min() >= 0
    if lift == 0.0:
        assert out[grid >= 1e-3].min() >= lo


@pytest.mark.parametrize(
    ("name", "steps", "lo", "hi"),
    [
        ("polar_express", 5, 0.8461, 1.1236),
        ("polar_express", 6, 0.9944, 1.0012),
        ("polar_express", 8, 0.99999, 1.00001),
        ("muon", 5, 0.4705, 1.2024),
        ("muon", 6, 0.6818, 1.2024),
        ("newton_schulz", 12, 0.98, 1.00001),
    ],
)
def test_the_documented_ranges_are_recomputed(name, steps, lo, hi):
    # stated to four digits, rounded outwards
    least, most = output_range(name, steps)
    assert lo <= least <= lo + 1e-2
    assert hi - 1e-3 <= most <= hi


def test_polar_express_is_optimal_again_each_step_so_its_published_digits_are_right():
    # the paper's construction: each quintic equioscillates about 1 on [lo, hi], so min + max = 2,
    # and the next interval is its image; a wrong digit breaks this in the third decimal
    lo, hi = 1e-3, 1.0
    for quintic in _POLAR_EXPRESS_RAW[:7]:
        lo, hi = quintic_range(quintic, lo, hi)
        assert lo + hi == pytest.approx(2.0, abs=2e-5)
    assert (lo, hi) == (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))


def test_newton_schulz_is_the_quintic_that_is_flat_at_one():
    a, b, c = TABLES["newton_schulz"].quintics[0]
    assert (a + b + c, a + 3 * b + 5 * c, 6 * b + 20 * c) == (1.0, 0.0, 0.0)


def test_quintic_range_is_exact_against_a_grid():
    for name in TABLES:
        for quintic in TABLES[name].quintics:
            a, b, c = quintic
            x = torch.linspace(0.05, 1.9, 100_001, dtype=torch.float64)
            values = x * (a + x**2 * (b + c * x**2))
            lo, hi = quintic_range(quintic, 0.05, 1.9)
            # 1e-13: the two evaluate the same polynomial in another order
            assert lo - 1e-13 <= values.min() <= lo + 1e-6
            assert hi - 1e-6 <= values.max() <= hi * (1 + 1e-13)


def adversarial(n: int) -> dict[str, torch.Tensor]:
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    return {
        "flat": torch.ones(n),
        "clustered at the top": 0.99 + 0.01 * ramp,
        "one outlier": torch.where(ramp == 1, 1.0, 1e-3),
        "rank one": (ramp == 1).double(),
        "rank deficient": torch.where(ramp < 0.6, 0.0, ramp),
        "twelve decades": torch.logspace(0, -12, n, dtype=torch.float64),
        "uniform": ramp,
    }


@pytest.mark.parametrize(
    "shape", [(96, 96), (64, 384), (384, 64), (64, 80), (1, 50), (50, 1), (1, 1)]
)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float64])
def test_sigma_max_is_never_above_one_for_adversarial_spectra(shape, compute):
    blocks = torch.stack([with_spectrum(*shape, s) for s in adversarial(min(shape)).values()])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for name, steps in (("polar_express", 5), ("polar_express", 8), ("muon", 5)):
            out = orthogonalize(blocks.to(dtype), name, steps, compute)
            assert out.dtype == dtype
            assert out.shape == blocks.shape
            above = max(ABOVE_ONE[dtype], ABOVE_ONE[compute])
            assert singular_values(out).max() <= 1 + above


def wide_and_hostile(d_out: int, d_in: int) -> torch.Tensor:
    """Spectra whose small values are hidden or lifted by rounding a Gram matrix to bf16."""
    n = min(d_out, d_in)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    halves = [torch.where(ramp < 0.5, low, 1.0) for low in (0.01, 0.03, 0.06, 0.1)]
    powers = [torch.logspace(0, -k, n, dtype=torch.float64) for k in (2, 3, 6)]
    spectra = [*adversarial(n).values(), *halves, *powers, 1 / (1 + n * ramp)]
    return torch.stack([with_spectrum(d_out, d_in, s) for s in spectra]).float()


HALVES = [
    (shape, torch.bfloat16, steps) for shape in ((64, 768), (200, 500)) for steps in (4, 5, 6)
]
# from 384 on products are made of pieces; a CPU emulates float16 slowly
HALVES += [
    ((500, 200), torch.bfloat16, 5),
    ((400, 640), torch.bfloat16, 5),
    ((32, 128), torch.float16, 5),
]


@pytest.mark.parametrize(("shape", "compute", "steps"), HALVES, ids=str)
def test_the_gram_form_in_half_precision_stays_below_one_for_hostile_spectra(shape, compute, steps):
    out = orthogonalize(wide_and_hostile(*shape), steps=steps, dtype=compute)
    assert singular_values(out).max() <= 1 + ABOVE_ONE[compute]


def test_without_the_shift_the_gram_form_in_bf16_would_leave_its_range(monkeypatch):
    blocks = wide_and_hostile(256, 640)
    monkeypatch.setattr(polar, "_SHIFT", 0.0)
    polar._segments.cache_clear()
    try:
        out = orthogonalize(blocks, steps=5, dtype=torch.bfloat16)
    finally:
        polar._segments.cache_clear()
    assert singular_values(out).max() > 1.01


def test_the_shift_is_within_the_slack_of_every_step():
    # sigma^2 may grow by 2 % before each step, because `output_range` counts 1 % of sigma. Twice
    # bf16's half spacing below a power of two is 2^-8 of it, so that adding the shift to any
    # diagonal entry there moves it up.
    for name in TABLES:
        for steps in (2, 3, 5, 8, 12):
            segments = polar._segments(name, steps, torch.bfloat16, True)
            assert sum(len(s.quintics) for s in segments) == steps
            assert len(segments[-1].quintics) == 1  # what rounding lifted is brought back
            done = 0
            for segment in segments:
                top = output_range(name, done)[1] ** 2 if done else 1.0
                assert segment.shift <= 0.0201 * top
                if segment.shift:
                    entries = torch.linspace(0, top, 10_001).bfloat16()
                    entries = entries[entries < 2.0 ** math.ceil(math.log2(top))]
                    assert (entries + segment.shift > entries).all()
                done += len(segment.quintics)


def test_half_precision_still_lifts_small_singular_values():
    s = torch.ones(256, dtype=torch.float64)
    s[128:], s[192:] = 0.1, 0.01
    out = orthogonalize(with_spectrum(256, 640, s).float(), steps=5, dtype=torch.bfloat16).double()
    u, v = orthonormal(256, 256, 1), orthonormal(640, 256, 2)
    gains = (u.mT @ out * v.mT).sum(1)
    assert (
        gains.min() >= 0.6
    )  # float32: 0.75; norm_F(G^2)^(1/4) = 3.4 sigma_max, so 0.01 enters as 0.003
    assert gains.max() <= 1.0 + 2e-3


@settings(deadline=None, max_examples=40)
@given(
    d_out=st.integers(1, 24),
    d_in=st.integers(1, 24),
    exponent=st.integers(-37, 36),
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(TABLES)),
    steps=st.integers(1, 12),
)
def test_sigma_max_is_never_above_one(d_out, d_in, exponent, seed, name, steps):
    w = torch.randn(2, d_out, d_in, generator=torch.Generator().manual_seed(seed))
    out = orthogonalize(w * 10.0**exponent, name, steps)
    assert singular_values(out).max() <= 1 + 1e-6


@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (192, 48)])
def test_output_is_inside_the_proven_range_and_has_the_same_singular_vectors(shape):
    n = min(shape)
    # norm_F((W W^T)^2)^(1/4) <= n^(1/4) sigma_max, so that the polynomials see at least
    # 1e-2 / n^(1/4) > 1e-3.
    s = torch.linspace(1e-2, 1, n, dtype=torch.float64)
    w = with_spectrum(*shape, s)
    for steps in (5, 6, 8):
        lo, hi = output_range("polar_express", steps)
        out = orthogonalize(w.float(), steps=steps)
        values = singular_values(out)
        # 1e-3: float32's noise on the smallest values, and the 1e-5 taken off on purpose
        assert values.min() >= lo / hi * (1 - 1e-3)
        polar = orthonormal(shape[0], n, 1) @ orthonormal(shape[1], n, 2).T
        spread = 1 - lo / hi + 1e-3
        assert torch.linalg.matrix_norm(out.double() - polar, 2) <= spread


def test_gram_form_and_standard_form_agree():
    w = torch.randn(3, 32, 128)
    wide = orthogonalize(w, steps=8)
    # float64 of the same shape runs the same algorithm without float32's noise. Padding with zero
    # rows to a near-square block runs the standard form.
    padded = torch.cat([w, torch.zeros(3, 88, 128)], dim=-2)
    standard = orthogonalize(padded, steps=8)[:, :32]
    torch.testing.assert_close(wide, standard, rtol=0.0, atol=1e-4)
    torch.testing.assert_close(
        wide, orthogonalize(w.double(), steps=8).float(), rtol=0.0, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(dtype, scale):
    w = torch.randn(16, 24).to(dtype)
    plain = orthogonalize(w, steps=8)
    scaled = orthogonalize(w * scale, steps=8)
    # the scaled input is rounded to its dtype before it comes here: that much it may differ
    atol = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(plain, scaled, rtol=0.0, atol=atol)


def test_zero_directions_stay_zero_and_zero_blocks_give_zero():
    w = torch.zeros(3, 8, 40)
    w[1] = torch.randn(8, 2) @ torch.randn(2, 40)
    out = orthogonalize(w, steps=8)
    assert (out[0] == 0).all()
    assert (out[2] == 0).all()
    values = singular_values(out[1])
    assert values[1] > 0.99
    assert values[2] < 1e-3  # float32's noise of 1e-7 grows by less than 1e4


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0), (0, 0)])
def test_empty_blocks_give_themselves(shape):
    assert orthogonalize(torch.zeros(shape)).shape == shape


def test_non_finite_blocks_are_refused_unless_the_caller_vouches():
    w = torch.randn(3, 4, 5)
    w[1, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="1 of 3"):
        orthogonalize(w)
    out = orthogonalize(w, check_finite=False)
    assert out[1].isnan().all()  # never a silent number
    assert out[0].isfinite().all()


def test_bad_arguments_are_refused_with_the_choices():
    w = torch.ones(2, 2)
    with pytest.raises(ConfigError, match="polar_express"):
        orthogonalize(w, "nonsense")
    with pytest.raises(ConfigError, match="step"):
        orthogonalize(w, steps=0)
    with pytest.raises(ConfigError):
        orthogonalize(torch.ones(3))
    with pytest.raises(ConfigError):
        orthogonalize(w.long())
    with pytest.raises(ConfigError):
        orthogonalize(w, dtype=torch.complex64)


def test_input_is_untouched_and_the_result_carries_no_gradient():
    w = torch.randn(6, 9, requires_grad=True)
    before = w.detach().clone()
    out = orthogonalize(w)
    assert torch.equal(w.detach(), before)
    assert not out.requires_grad
