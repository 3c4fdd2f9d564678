"""All seven projections stay within the cap, and map singular values as promised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lip_plugin.errors import ConfigError, NonFiniteError
from lip_plugin.linalg import projections
from lip_plugin.linalg.norms import rms_to_rms_exact
from lip_plugin.linalg.polar import orthogonalize
from lip_plugin.linalg.projections import METHODS, SOFT_CAP_MAX_INPUT, project, soft_cap_alpha
from tests.support.oracles import orthonormal

# What is promised, by dtype of the stored block: see `projections.TOLERANCE`.
ABOVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def with_spectrum(d_out: int, d_in: int, s: torch.Tensor) -> torch.Tensor:
    """Singular values s in units of a cap of 1 in the RMS->RMS norm."""
    u, v = orthonormal(d_out, len(s), 1), orthonormal(d_in, len(s), 2)
    return (u * (s.double() * math.sqrt(d_out / d_in))) @ v.T


def values_of(w: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(w.double()) * math.sqrt(w.shape[-1] / w.shape[-2])


def adversarial(n: int) -> dict[str, torch.Tensor]:
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    return {
        "flat just above": torch.full((n,), 1.003),
        "clustered at the cap": 0.99 + 0.02 * ramp,
        "one outlier": torch.where(ramp == 1, 45.0, 0.5 * ramp),
        "rank one": 3.0 * (ramp == 1).double(),
        "rank deficient": torch.where(ramp < 0.6, 0.0, 2 * ramp),
        "far above": 30 + 20 * ramp,
        "far below": 1e-3 * ramp,
        "twelve decades": torch.logspace(3, -9, n, dtype=torch.float64),
        "zero": 0 * ramp,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(48, 48), (24, 120), (120, 24), (1, 40), (40, 1)])
def test_cap_holds_for_adversarial_spectra_in_every_dtype(method, shape):
    blocks = torch.stack([with_spectrum(*shape, s) for s in adversarial(min(shape)).values()])
    for cap in (0.05, 1.0, 7.0):
        for dtype, above in ABOVE.items():
            out = project((blocks * cap).to(dtype), cap, method, lr=0.1, weight_decay=0.3)
            assert out.dtype == dtype
            assert out.shape == blocks.shape
            assert (rms_to_rms_exact(out) <= cap * (1 + above)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cap_holds_at_extreme_scales(method, scale):
    for dtype in (torch.float32, torch.float64):
        w = torch.randn(2, 16, 24).to(dtype) * scale
        out = project(w, 0.7, method, lr=0.1)
        assert (rms_to_rms_exact(out) <= 0.7 * (1 + ABOVE[dtype])).all()
        tiny_cap = project(w, 0.7 * scale, method, lr=0.1)
        assert (rms_to_rms_exact(tiny_cap) <= 0.7 * scale * (1 + ABOVE[dtype])).all()


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(sorted(METHODS)),
    d_out=st.integers(1, 10),
    d_in=st.integers(1, 10),
    exponent=st.floats(-3, 3),
    cap=st.floats(0.01, 20),
    lr=st.floats(0, 0.5),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(sorted(ABOVE, key=str)),
)
def test_cap_holds_whatever_the_input(method, d_out, d_in, exponent, cap, lr, seed, dtype):
    w = torch.randn(2, d_out, d_in, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    out = project(w.to(dtype), cap, method, lr=lr, weight_decay=0.1)
    assert (rms_to_rms_exact(out) <= cap * (1 + ABOVE[dtype])).all()


@pytest.mark.parametrize("method", METHODS)
def test_cap_holds_for_a_512_square_of_norm_45(method):
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    assert 44 < float(rms_to_rms_exact(w)) < 46
    assert float(rms_to_rms_exact(project(w, 1.0, method, lr=0.01))) <= 1 + 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_worst_overshoot_before_catching_is_the_stated_one(method):
    entry = METHODS[method]
    top = min(entry.input_max, 40.0)
    for shape in ((48, 48), (24, 120)):
        n = min(shape)
        ramp = torch.linspace(0, 1, n, dtype=torch.float64)
        for s in (ramp, torch.ones(n), 0.99 + 0.01 * ramp, (ramp == 1).double(), ramp**0.1):
            w = with_spectrum(*shape, s * top).float()[None]
            scale = torch.full((1, 1, 1), math.sqrt(shape[0] / shape[1]), dtype=torch.float64)
            call = projections._Call(scale, None, math.inf, 1 - 0.1 * 0.3)
            factor, correction, _ = entry.fn(w, call)
            out = (1.0 if factor is None else factor.float()) * w
            out = out if correction is None else out + correction
            assert values_of(out).max() <= 1 + entry.overshoot


# --- the maps -----------------------------------------------------------------------------------


def test_soft_cap_alpha_is_the_least_that_maps_the_interval_into_one():
    for x_max in (1 + 1e-9, 1.0001, 1.01, 1.05, 1.1, 1.2, 1.3, SOFT_CAP_MAX_INPUT):
        alpha = soft_cap_alpha(x_max)
        x = torch.linspace(0, x_max, 100_001, dtype=torch.float64)

        def largest(a, x=x):
            y = x - a * x**3
            return float((y + a * y**3).max())

        assert largest(alpha) <= 1 + 1e-15  # of evaluating the polynomial
        assert largest(alpha * (1 - 1e-4)) > 1  # and less would not do
        assert alpha <= 0.1953
    assert soft_cap_alpha(1.0) == 0.0
    assert soft_cap_alpha(0.3) == 0.0
    batch = torch.tensor([0.5, 1.02, 1.3], dtype=torch.float64)
    assert soft_cap_alpha(batch).tolist() == [soft_cap_alpha(float(x)) for x in batch]


def test_soft_cap_is_increasing_up_to_its_largest_input_and_not_beyond():
    # derived: the maximum of p lies where alpha x^2 = 1/3, and p = (62/81) x there
    alpha = soft_cap_alpha(SOFT_CAP_MAX_INPUT)
    x = torch.linspace(0, SOFT_CAP_MAX_INPUT, 10_001, dtype=torch.float64)
    y = x - alpha * x**3
    p = y + alpha * y**3
    assert (p.diff() > -1e-12).all()
    beyond = SOFT_CAP_MAX_INPUT * 1.01
    y = beyond - alpha * beyond**3
    assert y + alpha * y**3 < float(p[-1])


@pytest.mark.parametrize("shape", [(40, 40), (20, 90), (90, 20)])
@pytest.mark.parametrize("x_max", [1.001, 1.05, 1.3, 2.0])
def test_soft_cap_applies_its_polynomial_to_every_singular_value(shape, x_max):
    s = torch.linspace(0.01, x_max, min(shape), dtype=torch.float64)
    w = with_spectrum(*shape, s)
    divide = max(1.0, (x_max + 1e-5) / SOFT_CAP_MAX_INPUT)
    alpha = soft_cap_alpha((x_max + 1e-5) / divide if divide == 1.0 else SOFT_CAP_MAX_INPUT)
    x = s / divide
    y = x - alpha * x**3
    expected = (y + alpha * y**3).flip(0)
    # float64: 1e-12; float32: rounding of four products
    torch.testing.assert_close(
        values_of(project(w, 1.0, norm_upper=x_max)), expected, rtol=1e-10, atol=1e-12
    )
    out = project(w.float(), 1.0, norm_upper=x_max)
    torch.testing.assert_close(values_of(out), expected, rtol=1e-4, atol=1e-6)


def test_soft_cap_leaves_small_values_and_blocks_within_the_cap_alone():
    w = torch.randn(3, 30, 40) * 1e-3
    assert torch.equal(project(w, 1.0), w)
    w[1] *= 1e4
    out = project(w, 1.0)
    assert torch.equal(out[0], w[0])
    assert torch.equal(out[2], w[2])
    s = torch.cat([torch.full((20,), 1e-3, dtype=torch.float64), torch.tensor([1.1])])
    out = project(with_spectrum(21, 21, s), 1.0)
    # the change is of second order in alpha s^2 < 2e-7
    assert float(values_of(out)[-1]) == pytest.approx(1e-3, rel=1e-10)


def test_soft_cap_measures_when_the_learning_rate_says_nothing():
    w = with_spectrum(30, 30, torch.linspace(0, 9, 30)).float()
    for lr in (0.0, 0.01, 1.0):
        assert float(rms_to_rms_exact(project(w, 1.0, lr=lr))) <= 1 + 1e-5


@pytest.mark.parametrize("shape", [(40, 40), (20, 90), (90, 20)])
@pytest.mark.parametrize("top", [1.5, 45.0, 1e5])
def test_hard_cap_is_min_of_one_and_s_and_keeps_the_values_below(shape, top):
    s = torch.linspace(0.05, 1.0, min(shape), dtype=torch.float64)
    s[-4:] = torch.tensor([1.0, 1.2, top, top])
    expected = s.clamp(max=1).sort(descending=True).values
    for dtype in (torch.float32, torch.float64):
        out = values_of(project(with_spectrum(*shape, s).to(dtype), 1.0, "hard_cap"))
        # The promise is 1e-4 relative. Storing the input in float32 moves values by 6e-8 * top.
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-7 * top)


def test_hard_cap_leaves_blocks_within_the_cap_to_the_last_bit_and_is_idempotent():
    w = torch.stack(
        [with_spectrum(30, 40, torch.linspace(0, t, 30)) for t in (0.5, 1.0, 3.0)]
    ).float()
    once = project(w, 1.0, "hard_cap")
    assert torch.equal(once[0], w[0])
    assert torch.equal(project(once, 1.0, "hard_cap"), once)


def test_hard_cap_keeps_rank_and_directions_of_a_rank_deficient_block():
    s = torch.cat([torch.zeros(20), torch.tensor([0.3, 1.0, 2.0, 60.0])])
    w = with_spectrum(24, 24, s)
    out = project(w.float(), 1.0, "hard_cap")
    exact = with_spectrum(24, 24, s.clamp(max=1))
    assert torch.linalg.matrix_norm(out.double() - exact, 2) < 1e-5


def test_spectral_normalize_scales_and_only_if_above():
    below = with_spectrum(20, 30, torch.linspace(0.1, 0.9, 20)).float()
    assert torch.equal(project(below, 1.0, "spectral_normalize"), below)
    above = below * 5
    out = project(above, 1.0, "spectral_normalize")
    # within 0.1 % of s / s_1: the bound that divides is that tight
    torch.testing.assert_close(
        values_of(out), values_of(above) / values_of(above)[0], rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(40, 40), (20, 90), (90, 20)])
def test_stiefel_sends_all_to_one_and_zero_stays_zero(shape):
    w = with_spectrum(*shape, torch.linspace(0.05, 3, min(shape)))
    for dtype in (torch.float32, torch.float64):
        out = values_of(project(w.to(dtype), 1.0, "stiefel"))
        assert out.min() >= 0.99
    assert (project(torch.zeros(*shape), 1.0, "stiefel") == 0).all()


@pytest.mark.parametrize("top", [0.2, 0.95, 1.0, 4.0])
def test_spectral_hammer_sets_the_largest_to_one_also_from_below(top):
    s = torch.linspace(0, 0.15, 30, dtype=torch.float64)
    s[-1] = top
    out = values_of(project(with_spectrum(30, 50, s).float(), 1.0, "spectral_hammer"))
    assert float(out[0]) == pytest.approx(1.0, rel=1e-3)
    # gap 0.15 / 0.2: thirty double rounds of eight vectors leave nothing of the second value
    torch.testing.assert_close(out[1:], s.flip(0)[1:], rtol=2e-3, atol=1e-5)


def test_spectral_hammer_of_a_clustered_top_attains_the_cap_within_a_percent():
    s = torch.cat(
        [torch.rand(30, generator=torch.Generator().manual_seed(0)), torch.full((30,), 0.99)]
    )
    out = values_of(project(with_spectrum(60, 60, s).float(), 1.0, "spectral_hammer"))
    assert 0.99 <= float(out[0]) <= 1 + 1e-5


def test_spectral_weight_decay_lowers_only_the_largest():
    s = torch.linspace(0, 0.5, 30, dtype=torch.float64)
    s[-1] = 0.9
    out = values_of(
        project(
            with_spectrum(30, 50, s).float(), 1.0, "spectral_weight_decay", lr=0.5, weight_decay=0.2
        )
    )
    assert float(out[0]) == pytest.approx(0.9 * 0.9, rel=1e-5)
    torch.testing.assert_close(out[1:], s.flip(0)[1:], rtol=1e-4, atol=1e-6)


def test_weight_decay_scales_everything():
    w = torch.randn(2, 10, 12) * 0.01
    torch.testing.assert_close(project(w, 1.0, "weight_decay", lr=0.5, weight_decay=0.2), w * 0.9)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "cap"), [(0.3, 1.0), (0.02, 1.2), (0.1, 0.2), (0.5, 0.1)])
@pytest.mark.parametrize("method", ["soft_cap", "weight_decay", "hard_cap"])
def test_cap_holds_after_each_of_200_muon_steps(lr, cap, method):
    """The cap holds after each of 200 steps of Muon.

    The adversary always pushes along the same directions, the worst case for a smooth cap.
    """
    torch.manual_seed(0)
    w = torch.zeros(1, 16, 24)
    push = orthogonalize(torch.randn(1, 16, 24), steps=8)
    decay = 1 / cap if method == "weight_decay" and lr <= cap else 0.0
    for step in range(200):
        noise = orthogonalize(torch.randn(1, 16, 24))
        update = orthogonalize(push + 0.1 * (step % 3) * noise, steps=8)
        w = w + lr * math.sqrt(16 / 24) * update
        known = (cap + lr) * (1 + 1e-5)
        w = project(w, cap, method, lr=lr, weight_decay=decay, norm_upper=known)
        assert float(rms_to_rms_exact(w)) <= cap * (1 + 1e-5)
    # and the cap does not suffocate: constant pushes are held well above zero
    assert float(rms_to_rms_exact(w)) > 0.5 * min(cap, lr)


def test_known_bound_needs_no_norm_at_all(monkeypatch):
    def forbidden(*_):
        raise AssertionError("a norm was computed")

    for name in ("sigma_max_upper", "sigma_max_within"):
        monkeypatch.setattr(projections, name, forbidden)
    w = with_spectrum(20, 30, torch.linspace(0, 1.1, 20)).float()
    for bound in (1.1, torch.tensor(1.1, dtype=torch.float64)):
        assert values_of(project(w, 1.0, norm_upper=bound)).max() <= 1 + 1e-5
    project(w, 1.0, "weight_decay", lr=0.5, weight_decay=0.5, norm_upper=1.1)


def test_a_cap_for_each_block():
    caps = torch.tensor([[0.1, 1.0], [3.0, 1e3]])
    w = torch.randn(2, 2, 12, 20)
    for method in METHODS:
        out = project(w, caps, method)
        assert (rms_to_rms_exact(out) <= caps * (1 + 1e-5)).all()
    assert torch.equal(project(w, caps)[1, 1], w[1, 1])


def test_known_bounds_for_each_block():
    w = torch.stack(
        [with_spectrum(8, 8, torch.linspace(0, t, 8)) for t in (0.5, 1.2, 30.0)]
    ).float()
    bounds = torch.tensor([0.5, 1.2, 30.0]) * (1 + 1e-6)
    out = project(w, 1.0, norm_upper=bounds)
    assert (rms_to_rms_exact(out) <= 1 + 1e-5).all()
    torch.testing.assert_close(out[0], w[0], rtol=1e-6, atol=0.0)


def test_correction_is_added_to_the_master_so_small_weights_keep_their_bits():
    # two blocks on the diagonal: only the upper one is above the cap, so only it may change
    w = torch.zeros(20, 20)
    w[:10, :10] = with_spectrum(10, 10, torch.linspace(0, 1.2, 10)).float()
    w[10:, 10:] = torch.randn(10, 10) * 1e-5
    out = project(w, 1.0)
    assert torch.equal(out[10:, 10:], w[10:, 10:])
    assert not torch.equal(out[:10, :10], w[:10, :10])


def test_a_stored_orthogonal_bf16_block_is_shrunk_back_under_its_cap():
    raw = orthonormal(256, 256, 0).bfloat16()
    assert float(rms_to_rms_exact(raw)) > 1 + 1e-3  # what storing alone does
    out = project(raw, 1.0, "hard_cap")
    assert float(rms_to_rms_exact(out)) <= 1 + 1e-3
    assert values_of(out).min() > 0.97


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
class TestEdges:
    def test_zero_blocks_stay_zero_beside_others(self, method):
        w = torch.zeros(3, 6, 8)
        w[1] = torch.randn(6, 8) * 10
        out = project(w, 1.0, method)
        assert (out[0] == 0).all()
        assert (out[2] == 0).all()

    @pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0), (0, 0)])
    def test_empty_blocks_give_themselves(self, method, shape):
        assert project(torch.zeros(shape), 1.0, method).shape == shape

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_non_finite_blocks_are_counted_and_refused(self, method, bad):
        w = torch.ones(4, 5, 6)
        w[2, 0, 0] = bad
        for known in (None, 1.0):
            with pytest.raises(NonFiniteError, match="1 of 4"):
                project(w, 1.0, method, norm_upper=known)

    @pytest.mark.parametrize("cap", [0.0, -1.0, math.nan, math.inf])
    def test_caps_that_are_not_positive_numbers_are_refused(self, method, cap):
        for given_as in (cap, torch.tensor([1.0, cap])):
            with pytest.raises(ConfigError, match="cap"):
                project(torch.ones(2, 3, 3), given_as, method)

    def test_input_is_untouched_and_the_result_is_new(self, method):
        for scale in (1e-3, 10.0):
            w = (torch.randn(2, 6, 7) * scale).requires_grad_()
            before = w.detach().clone()
            out = project(w, 1.0, method)
            assert torch.equal(w.detach(), before)
            assert out.data_ptr() != w.data_ptr()
            assert not out.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_gives_the_same_bits_in_the_same_memory(method, dtype):
    for cap in (0.1, 100.0):
        w = torch.stack(
            [with_spectrum(30, 20, torch.linspace(0, t, 20)) for t in (0.5, 1.2, 30.0)]
        ).to(dtype)
        for blocks in (w, w.mT.contiguous().mT):
            expected = project(blocks, cap, method, lr=0.1, weight_decay=0.1)
            memory = blocks.clone()
            out = project(memory, cap, method, lr=0.1, weight_decay=0.1, in_place=True)
            assert out.data_ptr() == memory.data_ptr()
            assert torch.equal(out, expected)


def test_in_place_refuses_before_it_writes():
    w = torch.ones(2, 3, 4)
    w[1, 0, 0] = math.nan
    before = w.clone()
    with pytest.raises(NonFiniteError):
        project(w, 0.1, norm_upper=2.0, in_place=True)
    torch.testing.assert_close(w, before, rtol=0.0, atol=0.0, equal_nan=True)


def test_unknown_methods_are_refused_with_the_seven_choices():
    with pytest.raises(ConfigError) as error:
        project(torch.ones(2, 2), 1.0, "softcap")
    assert len(METHODS) == 7
    assert all(name in str(error.value) for name in METHODS)


def test_bad_rates_bounds_and_tensors_are_refused():
    w = torch.ones(2, 2)
    with pytest.raises(ConfigError, match="weight_decay"):
        project(w, 1.0, lr=2.0, weight_decay=1.0)
    with pytest.raises(ConfigError, match="norm_upper"):
        project(w, 1.0, norm_upper=math.inf)
    with pytest.raises(ConfigError):
        project(w.long(), 1.0)
    with pytest.raises(ConfigError):
        project(torch.ones(3), 1.0)


def test_reduced_matmul_precision_is_noticed_and_caught():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for method in METHODS:
            out = project(torch.randn(40, 60) * 0.5, 0.5, method, lr=0.1)
            assert float(rms_to_rms_exact(out)) <= 0.5 * (1 + 1e-5)
    finally:
        torch.set_float32_matmul_precision(before)
