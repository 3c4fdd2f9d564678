"""Orthogonalize matrices by polynomials: W = U S V^T becomes about U V^T, and sigma_max at most 1.

LipschitzMuon does this with its momentum in every step, so it works on batches and without an SVD.
Each step maps X to X p(X^T X), which is an odd quintic x -> a x + b x^3 + c x^5 on the singular
values.

The image of an interval under such a quintic follows in closed form from its critical points. So
the range of a whole sequence of steps on [0, 1] is known exactly (`output_range`). The result is
divided by the upper end of that range, which allows for a relative rounding error of 1 % before
every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lip_plugin.errors import ConfigError, NonFiniteError
from lip_plugin.linalg.precision import without_autocast
from lip_plugin.linalg.symmetric import product, symmetric_product

Quintic = tuple[float, float, float]
# How far rounding may lift a singular value before each step, relative to it; see `output_range`.
_STEP_SLACK = 1e-2
# The lower ends of the ranges below hold for singular values from here to 1.
_MIN_INPUT = 1e-3
# From this aspect ratio on, three steps on the Gram matrix cost less than three on X itself.
_GRAM_ASPECT = 1.5
# Steps in one segment. In float32 the noise of the Gram matrix (1e-7) grows by 2e4 in the three
# steepest steps, so then it is computed anew. The second number is for bf16 and fp16; see
# `_segments`.
_GRAM_STEPS = 3
_GRAM_STEPS_HALF = 2
# For bf16 and fp16; see `_segments`. _NOISE times the rms eigenvalue of p times eps is what
# rounding p may add to sigma_max. _SHIFT is a share of the Gram matrix's range.
_NOISE = 0.75
_SHIFT = 2.0**-8


@dataclass(frozen=True)
class CoefficientTable:
    """A sequence of odd quintics (a, b, c).

    The last quintic is repeated if more steps are asked for than the table has.
    """

    quintics: tuple[Quintic, ...]
    default_steps: int
    source: str

    def first(self, steps: int) -> tuple[Quintic, ...]:
        """The first `steps` quintics."""
        return (self.quintics + (self.quintics[-1],) * steps)[:steps]


# As published, for singular values in [1e-3, 1], and without the safety factor.
_POLAR_EXPRESS_RAW: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# p(x / 1.01) takes the place of p(x). Otherwise a value 1e-5 above 1 diverges within eight steps.
_SAFETY = 1.01


def _with_safety(quintics: tuple[Quintic, ...]) -> tuple[Quintic, ...]:
    """p(x / safety) for all but the last quintic, which converges by itself: the paper's rule."""
    safe = tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in quintics[:-1])
    return (*safe, quintics[-1])


TABLES: dict[str, CoefficientTable] = {
    # For inputs in [1e-3, 1], and after division by the upper end of the range, outputs lie in
    # [0.753, 1] with 5 steps, in [0.993, 1] with 6, and in [0.9999, 1] with 8.
    "polar_express": CoefficientTable(
        _with_safety(_POLAR_EXPRESS_RAW),
        6,
        "Amsel, Persson, Musco, Gower: The Polar Express, arXiv 2505.16932, algorithm 1",
    ),
    # This one never converges: singular values settle in [0.68, 1.21].
    "muon": CoefficientTable(
        ((3.4445, -4.7750, 2.0315),), 5, "Keller Jordan, https://kellerjordan.github.io/posts/muon/"
    ),
    # This one maps [0, 1] into itself. It is slow at first: a step multiplies small values by
    # 1.875.
    "newton_schulz": CoefficientTable(
        ((15 / 8, -10 / 8, 3 / 8),),
        12,
        "Higham, Functions of Matrices (2008), section 8.3: Pade family, quintic polynomial",
    ),
}
# By how much the result is shortened to make up for the rounding of the last product and of storing
# it. For the half precisions it is 8 u, with u their unit roundoff: a stored orthogonal 1024 x 1024
# matrix is 0.24 % above 1 in bf16. For the wider ones it is generous. These are measured margins,
# not proofs, because the sum of 10^6 roundings has no useful worst case.
_STORE_SLACK = {
    torch.bfloat16: 2.0**-6,
    torch.float16: 2.0**-8,
    torch.float32: 1e-5,
    torch.float64: 1e-13,
}


def quintic_range(quintic: Quintic, lo: float, hi: float) -> tuple[float, float]:
    """The exact image, up to float64, of [lo, hi] with 0 <= lo under a x + b x^3 + c x^5."""
    a, b, c = quintic
    points = [lo, hi]
    discriminant = 9 * b * b - 20 * a * c
    if discriminant >= 0 and c != 0:
        for sign in (-1.0, 1.0):
            t = (-3 * b + sign * math.sqrt(discriminant)) / (10 * c)
            if t > 0 and lo < math.sqrt(t) < hi:
                points.append(math.sqrt(t))
    values = [x * (a + x * x * (b + c * x * x)) for x in points]
    return min(values), max(values)


@lru_cache(maxsize=256)
def output_range(name: str, steps: int, lo: float = _MIN_INPUT) -> tuple[float, float]:
    """The range of the first `steps` quintics of a table, before the result is divided.

    The image of an interval under a continuous map is an interval, so nothing is lost by mapping
    intervals step by step. The upper end is raised by 1 % before every step. So rounding that lifts
    a singular value by less than that cannot lift the output above it, except in the last product.

    Args:
        name: A key of TABLES.
        steps: How many quintics.
        lo: The smallest singular value that the lower end is for.

    Returns:
        (least output on [lo, 1], largest output on [0, 1.01]), rounded outwards by 1e-12.

    Raises:
        ConfigError: A step maps singular values below 0.
    """
    least, most = lo, 1.0
    for quintic in TABLES[name].first(steps):
        most *= 1.0 + _STEP_SLACK
        least = quintic_range(quintic, least * (1.0 - 1e-15), most)[0]
        bottom, most = quintic_range(quintic, 0.0, most)
        if bottom < 0.0:
            raise ConfigError(f"table {name!r}: a step maps singular values below 0 ({bottom})")
    return least * (1.0 - 1e-12), most * (1.0 + 1e-12)


# The table with this name, and the steps, of which None is the table's default.
def _validated(name: str, steps: int | None) -> tuple[CoefficientTable, int]:
    if name not in TABLES:
        raise ConfigError(f"unknown coefficients {name!r}: choose one of {', '.join(TABLES)}")
    table = TABLES[name]
    steps = table.default_steps if steps is None else steps
    if steps < 1:
        raise ConfigError(f"orthogonalize needs at least one step, got {steps}")
    return table, steps


def largest_entry(x: Tensor) -> Tensor:
    """The largest absolute entry of each matrix [..., n, m], as [..., 1, 1].

    It is nan if an entry is nan. It is computed by two reductions, because torch's infinity norm
    takes twenty times as long on a CPU, and abs() makes a copy.
    """
    return torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))


def _unit_max(x: Tensor, compute: torch.dtype, check_finite: bool) -> Tensor:
    """`x` [batch, d_out, d_in] in the compute dtype, with the largest entry of each block at 1.

    Entries can then be squared safely.
    """
    largest = largest_entry(x)
    if check_finite:
        bad = int((~largest.isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"{bad} of {len(x)} blocks to orthogonalize hold nan or inf: look at the gradients "
                "of this step (mixed precision: unscale first, skip steps that overflowed)"
            )
    wide = torch.promote_types(x.dtype, compute)
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    return (x.to(wide) / largest.to(wide)).to(compute)


@dataclass(frozen=True)
class _Segment:
    """Quintics that go through one Gram matrix, and what is added to its diagonal first."""

    quintics: tuple[Quintic, ...]
    shift: float


@lru_cache(maxsize=256)
def _segments(name: str, steps: int, dtype: torch.dtype, gram: bool) -> tuple[_Segment, ...]:
    """How `steps` quintics are cut into segments. Each segment starts from a new Gram matrix.

    Why segments: the eigenvalues g near 0 of the Gram matrix grow by the square of the first
    slopes, and its rounding grows with them. Rounding may make g negative, and there q(g) is above
    what the range allows. In float32 and wider nothing has to be done about it: the noise of 1e-7
    grows by 2e4 in the three steepest steps, and is then still small.

    In the half precisions a segment has two steps, and the last one or two steps are standard ones,
    which bring back what rounding lifted. The Gram matrix G of a segment is shifted to G + s I,
    where s is 2^-8 of a power of two that is not below the range of G. This s is twice what adding
    to a diagonal entry of that size can round away in bf16, and it is above what rounding moved an
    eigenvalue by (measured). The shift only lowers singular values: if G + s I - X X^T is positive
    semidefinite, then norm2(p(G + s I) X)^2 is at most the maximum of t p(t)^2 over the eigenvalues
    t of G + s I. `output_range` bounds that, because s is within its slack. Singular values far
    above sqrt(s) change little, and smaller ones come out lower.

    The rounding of p matters as well. p is up to 34 where X is small, and it acts where X is 1 too.
    Rounding p adds up to about 0.4 eps (rms eigenvalue of p) to sigma_max (measured). So the result
    is divided by 1 + 0.75 eps (rms eigenvalue of p). For flat spectra that is next to nothing, and
    it is never more than 1.2.

    Args:
        name: A key of TABLES.
        steps: How many quintics.
        dtype: The precision of the computation.
        gram: Whether several steps may go through one Gram matrix. If not, each segment has one
            step.
    """
    quintics = TABLES[name].first(steps)
    length = 1 if not gram else _GRAM_STEPS if dtype.itemsize >= 4 else _GRAM_STEPS_HALF
    segments = []
    start = 0
    while start < steps:
        left = steps - start
        if dtype.itemsize < 4 and left <= _GRAM_STEPS_HALF:
            length = 1
        part = quintics[start : start + length]
        top = output_range(name, start)[1] ** 2 if start else 1.0
        shifted = dtype.itemsize < 4 and len(part) > 1
        segments.append(
            _Segment(part, _SHIFT * 2.0 ** math.ceil(math.log2(top)) if shifted else 0.0)
        )
        start += len(part)
    return tuple(segments)


def _iterate(x: Tensor, segments: tuple[_Segment, ...], divide_by: float) -> Tensor:
    """Apply the quintics to x [..., n, k] with n <= k, starting again from x x^T at every segment.

    With q(G) = a I + b G + c G^2 each step is X <- q(G) X and G <- q(G)^2 G. Within a segment only
    n x n matrices are multiplied, and the polynomials accumulate in `p`. A segment of one step is
    the standard iteration. The first step divides by norm_F(G^2)^(1/4), which is at least
    sigma_max. This proven bound comes with the G^2 that is needed anyway; where G is shifted first,
    it costs one product more.
    """
    for number, segment in enumerate(segments):
        g = symmetric_product(x, x.mT)
        p: Tensor | None = None
        scale: Tensor | None = None
        if number == 0:
            g, g2, scale = _scaled(g)
        if segment.shift:
            g.diagonal(dim1=-2, dim2=-1).add_(segment.shift)
        if number or segment.shift:
            g2 = symmetric_product(g, g)
        for i, (a, b, c) in enumerate(segment.quintics):
            if i:
                g2 = symmetric_product(g, g)
            q = g2.mul_(c).add_(g, alpha=b)
            q.diagonal(dim1=-2, dim2=-1).add_(a)
            p = q if p is None else symmetric_product(q, p)
            if i + 1 < len(segment.quintics):
                g = symmetric_product(q, symmetric_product(q, g))
        assert p is not None  # a segment has at least one step
        if segment.shift:
            noise = torch.linalg.vector_norm(p.float(), dim=(-2, -1), keepdim=True)
            p = p / (1.0 + noise * (_NOISE * torch.finfo(p.dtype).eps / p.shape[-1] ** 0.5)).to(
                p.dtype
            )
        if scale is not None:
            p = p / scale.to(p.dtype)
        if number + 1 == len(segments):
            p = p / divide_by
        x = product(p, x)
    return x


def _scaled(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(g / s^2, g^2 / s^4, s) for s = norm_F(g^2)^(1/4)."""
    g2 = symmetric_product(g, g)
    scale = (
        torch.linalg.vector_norm(g2, dim=(-2, -1), keepdim=True, dtype=_wide(g2)).clamp_min(1e-30)
        ** 0.25
    )
    return g / (scale**2).to(g.dtype), g2 / (scale**4).to(g.dtype), scale


# The dtype of `x`, or float32 if that is wider.
def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@without_autocast
def orthogonalize(
    blocks: Tensor,
    coefficients: str = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    check_finite: bool = True,
) -> Tensor:
    """The approximate polar factor U V^T of each block, with sigma_max (l2 -> l2) at most 1.

    With the default table and steps, singular values above 1e-3 of norm_F((W W^T)^2)^(1/4) come out
    in [0.993, 1]. That scale lies between sigma_max and n^(1/4) sigma_max. Smaller singular values
    come out lower, without a jump, and zeros stay zero. For other tables and steps the range is the
    table's `output_range` divided by its upper end.

    In real arithmetic the result is never above 1. Computed, it is at most 1 + 1e-6 in float32 and
    wider, or 1 + 2e-3 in bf16 and fp16 for blocks up to 1024 wide, as tested.

    Blocks with an aspect ratio of 1.5 or more are iterated on the smaller Gram matrix, which is
    computed anew every three steps, or every two in bf16 and fp16. In these two, singular values of
    1e-3 come out at about half of what they do in float32, and those from 1e-2 on at 0.6 or more
    with five steps.

    Args:
        blocks: [..., d_out, d_in], floats of any scale from the smallest to the largest number of
            their dtype. Zero and empty blocks give themselves.
        coefficients: A key of TABLES.
        steps: How many quintics. None takes the table's default.
        dtype: The precision of the computation. None takes float64 for float64 blocks, and
            otherwise bf16 on CUDA and float32 elsewhere.
        check_finite: False saves a synchronization with the host. Blocks with nan then stay nan.

    Returns:
        A tensor of the dtype and shape of `blocks`, without gradient.

    Raises:
        NonFiniteError: A block holds nan or inf.
        ConfigError: An unknown table, no steps, a dtype that is not supported, or blocks that are
            no float matrices.
    """
    table, steps = _validated(coefficients, steps)
    if not blocks.is_floating_point() or blocks.dim() < 2:
        raise ConfigError(f"expected floats [..., d_out, d_in], got {blocks.dtype} {blocks.shape}")
    if blocks.numel() == 0:
        return blocks.detach().clone()
    if dtype is None:
        dtype = torch.bfloat16 if blocks.is_cuda else torch.float32
        if blocks.dtype == torch.float64:
            dtype = torch.float64
    if dtype not in _STORE_SLACK:
        raise ConfigError(f"cannot orthogonalize in {dtype}: choose one of {list(_STORE_SLACK)}")
    d_out, d_in = blocks.shape[-2:]
    small, large = sorted((d_out, d_in))
    segments = _segments(coefficients, steps, dtype, large >= _GRAM_ASPECT * small)
    shrink = 1.0 + max(_STORE_SLACK[dtype], _STORE_SLACK.get(blocks.dtype, 0.0))
    divide_by = output_range(coefficients, steps)[1] * shrink
    x = _unit_max(blocks.detach().reshape(-1, d_out, d_in), dtype, check_finite)
    if d_out > d_in:
        x = x.mT
    x = _iterate(x, segments, divide_by)
    if d_out > d_in:
        x = x.mT
    return x.to(blocks.dtype).reshape(blocks.shape)
