"""Norms of matrices [..., d_out, d_in]: exact ones, proven upper bounds, and attained lower bounds.

Open this file to measure a weight. The RMS norm of x in R^d is norm2(x) / sqrt(d). The RMS->RMS
norm of W is sigma_max(W) * sqrt(d_in / d_out), where sigma_max is the largest singular value, the
norm from l2 to l2.

All functions of a weight share these terms. They take w [..., d_out, d_in] of any float dtype, on
any device, and convert it exactly to float64. They give float64 [...], one number for each matrix
of the batch. They raise NonFiniteError if a matrix holds nan or inf. A matrix of zeros, or one with
a dimension of 0, has norm 0.

Rounding is part of every upper and lower bound; the constants and the proofs are in `spectrum`.
Entries of float32 and narrower dtypes can be squared in float64 without overflow or underflow.
Where the largest entry of a float64 input lies outside 2^-300 .. 2^300, the input is first scaled
by a power of two, which is exact. What underflows then is below 2^-230 of the largest entry, so its
square is far below any rounding that is counted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lip_plugin.errors import ConfigError, NonFiniteError
from lip_plugin.linalg.spectrum import (
    SLACK,
    U,
    gamma,
    gram_iteration,
    lambda_max_upper,
    proven_lambda_max,
)

# _ROWS: rows of a table that are compared at a time. _ROWS_ADDED: the most rows that adding two
# tables may make.
_ROWS, _ROWS_ADDED = 1024, 1 << 16
_CHUNK = 1 << 22  # entries converted to float64 at a time on a CPU; 32 MB stay near the cache


def _matrices(w: Tensor) -> Tensor:
    """`w` as [batch, d_out, d_in] without gradient. Raises ConfigError if it is no float matrix."""
    if not w.is_floating_point() or w.dim() < 2:
        raise ConfigError(
            f"expected a floating-point tensor [..., d_out, d_in], got {w.dtype} of shape "
            f"{tuple(w.shape)}"
        )
    return w.detach().reshape(math.prod(w.shape[:-2]), *w.shape[-2:])


def refuse_non_finite_blocks(per_block: Tensor) -> None:
    """Raise NonFiniteError if a block holds nan or inf.

    Args:
        per_block: One number for each block, which is finite if and only if the block is.
    """
    bad = int((~per_block.isfinite()).sum())
    if bad:
        raise NonFiniteError(
            f"{bad} of {per_block.numel()} blocks hold nan or inf; a norm needs finite weights: "
            "look at the loss and the learning rate of the step before"
        )


def _exponent(w: Tensor) -> Tensor | None:
    """The exponents e by which to scale blocks, or None if no scaling is needed.

    The entries of w * 2^-e are below 1, and one of them is at least 1/2.
    """
    if w.dtype != torch.float64:
        return None
    low, high = torch.aminmax(w.flatten(1), dim=1)
    largest = torch.maximum(high, -low)
    refuse_non_finite_blocks(largest)
    # In this range no square overflows, and none underflows that could matter. Zeros stay zeros.
    if bool(((largest == 0) | ((largest > 2.0**-300) & (largest < 2.0**300))).all()):
        return None
    return torch.frexp(largest)[1].to(torch.int64)


def _times_power_of_two(x: Tensor, e: Tensor | None) -> Tensor:
    """x * 2^e, with one e for each block.

    The factor is applied in two steps, because 2^1074 itself is no float64.
    """
    if e is None:
        return x
    half = e // 2
    one = torch.ones_like(e, dtype=torch.float64)
    shape = e.shape + (1,) * (x.dim() - e.dim())
    for part in (half, e - half):
        x = x * torch.ldexp(one, part).reshape(shape)
    return x


def _gram(b: Tensor) -> Tensor:
    """b b^T in float64, [batch, n, n], exactly symmetric.

    From n = 384 on it is computed in three block rows, each up to its diagonal block. This is two
    thirds of the work of the full product.
    """
    n = b.shape[-2]
    if n < 384:
        full = b @ b.mT
        return full.tril() + full.tril(-1).mT
    out = b.new_empty(b.shape[0], n, n)
    edges = [0, n // 3, 2 * (n // 3), n]
    for lo, hi in zip(edges, edges[1:], strict=False):
        rows = b[:, lo:hi] @ b[:, :hi].mT
        out[:, lo:hi, :hi] = rows
        out[:, :lo, lo:hi] = rows[:, :, :lo].mT
        corner = out[:, lo:hi, lo:hi]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
    return out


def _scaled_gram(w: Tensor) -> tuple[Tensor, Tensor | None]:
    """The Gram matrices of w * 2^-e, and e, which is None if no scaling was needed.

    On a CPU a few blocks are converted at a time, because large new buffers cost more there than
    the product.
    """
    e = _exponent(w)
    count, d_out, d_in = w.shape
    per = max(1, _CHUNK // (d_out * d_in)) if w.device.type == "cpu" else count
    if per >= count:
        return _gram_of_smaller_side(w, e), e
    parts = [
        _gram_of_smaller_side(part, None if e is None else e[i * per : (i + 1) * per])
        for i, part in enumerate(w.split(per))
    ]
    return torch.cat(parts), e


def _gram_of_smaller_side(w: Tensor, e: Tensor | None) -> Tensor:
    """The Gram matrices of w * 2^-e on the smaller side.

    On a CPU very long matrices, such as a head of 50,000 rows, are converted piece by piece.
    """
    rows = w if w.shape[-2] <= w.shape[-1] else w.mT
    width = rows.shape[-1]
    if w.device.type == "cpu":
        width = max(rows.shape[-2], 4 * _CHUNK // (len(w) * rows.shape[-2]))
    total = None
    for piece in rows.split(width, dim=-1):
        g = _gram(_times_power_of_two(piece.double(), None if e is None else -e))
        total = g if total is None else total.add_(g)
    assert total is not None  # matrices without entries do not come here: their norm is 0
    return total


def _gram_trace_slack(blocks: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(g, e, trace, slack): scaled Gram matrices, and how far rounding may have moved them.

    The computed g and the true Gram matrix G of B satisfy |g - G| <= gamma_k |B| |B|^T entry by
    entry, so norm2(g - G) <= gamma_k norm_F(B)^2. The computed trace equals norm_F(B)^2 up to a
    relative gamma_{n+k}, which the factor 2 in `slack` covers. The trace is 0 for blocks of zeros
    only.
    """
    g, e = _scaled_gram(blocks)
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
    return g, e, trace, 2.0 * gamma(sum(blocks.shape[-2:])) * trace


def sigma_max_upper(w: Tensor) -> Tensor:
    """Proven upper bound of sigma_max (l2 -> l2), rounding included, at most 0.1 % too high.

    The Gram matrix G of the smaller side is formed in float64. Its largest eigenvalue is guessed:
    by Lanczos in float32, or up to n = 128 from all eigenvalues. Then one Cholesky factorization
    proves that c I - G is positive definite, for a c just above the guess (`proven_lambda_max`). If
    the factorization fails, three fallbacks follow in turn: a wider margin, the eigenvalues in
    float64, and Gram iteration. The whole costs one synchronization with the host.

    Args:
        w: [..., d_out, d_in], of any float dtype.

    Returns:
        float64 [...]; inf only where the bound itself exceeds float64.

    Raises:
        NonFiniteError: A block holds nan or inf.
    """
    blocks = _matrices(w)
    if blocks.numel() == 0:
        return blocks.new_zeros(w.shape[:-2], dtype=torch.float64)
    g, e, trace, slack = _gram_trace_slack(blocks)
    bound = lambda_max_upper(g, slack)
    if not bool(trace.isfinite().all()):
        refuse_non_finite_blocks(trace)
    upper = torch.where(trace == 0, 0.0, bound.sqrt() * SLACK)
    return _times_power_of_two(upper, e).reshape(w.shape[:-2])


def sigma_max_within(w: Tensor, limit: Tensor) -> Tensor:
    """Whether sigma_max (l2 -> l2) <= limit is proven, rounding included.

    This is as cheap as a proof gets: one Cholesky factorization for each block, and no estimate.
    Where the answer is no, the true norm is above the limit or below it by about 1e-9 at most.

    Args:
        w: [..., d_out, d_in], of any float dtype.
        limit: float64 [...].

    Returns:
        bool [...]. Raises NonFiniteError as all functions here do.
    """
    blocks = _matrices(w)
    if blocks.numel() == 0:
        return torch.ones(w.shape[:-2], dtype=torch.bool, device=w.device)
    g, e, trace, slack = _gram_trace_slack(blocks)
    refuse_non_finite_blocks(trace)
    target = _times_power_of_two(limit.reshape(-1), None if e is None else -e)
    n = g.shape[-1]
    # This solves `bound <= target^2`, with the bound of `proven_lambda_max`, for c. The factor just
    # below 1 leaves room for the rounding of this line.
    c = (target * target * (1.0 - 1e-14) - slack) / (1.0 + 2.0 * n * gamma(8 * (n + 1)) + 4.0 * U)
    c = c.clamp(max=4.0 * trace + 1e-300)  # makes a number out of an infinite limit
    bound, ok = proven_lambda_max(g, c.clamp_min(0.0), slack)
    within = (ok & (bound <= target * target)) | (trace == 0)
    return within.reshape(w.shape[:-2])


def sigma_max_upper_gram(w: Tensor, rounds: int = 12) -> Tensor:
    """Proven upper bound of sigma_max (l2 -> l2) by Gram iteration: matrix products only.

    It uses sigma_max <= norm_F((W^T W)^(2^rounds))^(1 / 2^(rounds + 1)), rescaled in each round.
    With n the smaller side, it exceeds the truth by at most the factor n^(1 / 2^(rounds + 2)),
    which orthogonal matrices attain: 0.04 % for n = 768 and 12 rounds, 0.16 % for 10 rounds.
    Rounding is bounded in `gram_iteration`.

    Args:
        w: [..., d_out, d_in], of any float dtype.
        rounds: How often the Gram matrix is squared.

    Source: Delattre et al., "Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram
    Iteration", ICML 2023, arXiv 2305.16173.
    """
    blocks = _matrices(w)
    if blocks.numel() == 0:
        return blocks.new_zeros(w.shape[:-2], dtype=torch.float64)
    g, e, trace, slack = _gram_trace_slack(blocks)
    refuse_non_finite_blocks(trace)
    upper = (gram_iteration(g, rounds) + slack).sqrt() * SLACK
    upper = torch.where(trace == 0, 0.0, upper)
    return _times_power_of_two(upper, e).reshape(w.shape[:-2])


def sigma_max_lower(
    w: Tensor, rounds: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """Attained lower bound of sigma_max (l2 -> l2): norm2(W x) / norm2(x) after power iteration.

    The rounding of that quotient is subtracted, so the result is never above the truth.

    Args:
        w: [..., d_out, d_in], of any float dtype.
        rounds: Steps of the power iteration.
        generator: On the CPU; makes the starting vector. Without one the start is always the same.
    """
    blocks = _matrices(w)
    if blocks.numel() == 0:
        return blocks.new_zeros(w.shape[:-2], dtype=torch.float64)
    e = _exponent(blocks)
    b = _times_power_of_two(blocks.double(), None if e is None else -e)
    frobenius = torch.linalg.vector_norm(b, dim=(-2, -1))
    refuse_non_finite_blocks(frobenius)
    d_out, d_in = b.shape[-2:]
    generator = generator or torch.Generator().manual_seed(0)
    x = torch.randn(d_in, 1, generator=generator, dtype=torch.float64).to(b.device)
    x = x.expand(b.shape[0], d_in, 1)
    for _ in range(rounds):
        x = b.mT @ (b @ x)
        x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(1e-300)
    norm_x = torch.linalg.vector_norm(x, dim=(-2, -1))
    attained = torch.linalg.vector_norm(b @ x, dim=(-2, -1)) / norm_x.clamp_min(1e-300)
    # W x is off by at most gamma_{d_in} norm_F(W) norm2(x). Each of the two norms is off by at most
    # gamma of its length, relative to itself.
    rounding = gamma(d_in) * frobenius + gamma(d_in + d_out + 8) * attained
    lower = (attained - 2.0 * rounding).clamp_min(0.0)
    return _times_power_of_two(lower, e).reshape(w.shape[:-2])


def sigma_max_exact(w: Tensor) -> Tensor:
    """sigma_max (l2 -> l2) by an SVD in float64, for tests and where no proof is needed.

    It is accurate to about 1e-15 n, and it is not widened into a bound.
    """
    blocks = _matrices(w)
    if blocks.numel() == 0:
        return blocks.new_zeros(w.shape[:-2], dtype=torch.float64)
    refuse_non_finite_blocks(blocks.abs().amax(dim=(-2, -1)))
    if blocks.shape[-2] < blocks.shape[-1]:
        blocks = blocks.mT  # LAPACK takes three times as long for 768 x 3072 as for 3072 x 768
    return torch.linalg.svdvals(blocks.double())[:, 0].reshape(w.shape[:-2])


def _rms_factor(w: Tensor) -> float:
    """sqrt(d_in / d_out), the factor from sigma_max to the RMS->RMS norm."""
    return math.sqrt(w.shape[-1] / max(1, w.shape[-2]))


def rms_to_rms_exact(w: Tensor) -> Tensor:
    """RMS->RMS norm by an SVD in float64, float64 [...], no bound. See `sigma_max_exact`."""
    return sigma_max_exact(w) * _rms_factor(w)


def rms_to_rms_upper(w: Tensor) -> Tensor:
    """Proven upper bound of the RMS->RMS norm, float64 [...]. See `sigma_max_upper`."""
    return sigma_max_upper(w) * (_rms_factor(w) * SLACK)


def rms_to_rms_lower(
    w: Tensor, rounds: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """Attained lower bound of the RMS->RMS norm, float64 [...]. See `sigma_max_lower`."""
    return sigma_max_lower(w, rounds, generator) * (_rms_factor(w) / SLACK)


def rms_norm(x: Tensor, dim: int = -1) -> Tensor:
    """RMS norm norm2(x) / sqrt(d) of the vectors along `dim`, in float64. It is 0 for d = 0."""
    d = x.shape[dim]
    if d == 0:
        return x.detach().double().sum(dim)
    return torch.linalg.vector_norm(x.double(), dim=dim) / math.sqrt(d)


def row_rms_max_upper(w: Tensor) -> Tensor:
    """Proven upper bound of the largest RMS norm of a row of `w` [..., d_out, d_in], float64 [...].

    Each computed sum of squares is off by at most gamma_{d_in} of itself. Raises NonFiniteError if
    an entry is nan or inf.
    """
    blocks = _matrices(w)
    if blocks.numel() == 0:
        return blocks.new_zeros(w.shape[:-2], dtype=torch.float64)
    e = _exponent(blocks)
    b = _times_power_of_two(blocks.double(), None if e is None else -e)
    largest = torch.linalg.vector_norm(b, dim=-1).amax(-1)
    refuse_non_finite_blocks(largest)
    d_in = b.shape[-1]
    upper = largest / math.sqrt(d_in) * ((1.0 + gamma(d_in + 8)) * SLACK)
    return _times_power_of_two(upper, e).reshape(w.shape[:-2])


def _longest(table: Tensor) -> float:
    """Upper bound of the largest RMS norm of a row, one piece of the table at a time."""
    return max((float(row_rms_max_upper(part)) for part in table.split(_ROWS)), default=0.0)


@torch.no_grad()
def sum_rms_max_upper(tables: list[Tensor]) -> float:
    """Proven upper bound of the largest RMS norm of a sum that takes one row from each table.

    Two tables are compared row by row: RMS(a + b)^2 = (|a|^2 + 2 a.b + |b|^2) / d. The products are
    computed in float64, because autocast and TF32 shorten float32 ones. The result is about 1e-13
    too high. If there are more than two tables, the small ones are first added up, each row with
    each. Where that would make too many rows, the largest norms of the tables are added instead.

    Args:
        tables: Matrices [n_i, d] with the same d. Raises NonFiniteError for nan and inf.
    """
    tables = sorted(tables, key=len)
    added = 0.0  # what rounding the sums of tables may hide: half a unit of each entry
    while len(tables) > 2 and len(tables[0]) * len(tables[1]) <= _ROWS_ADDED:
        a, b, *rest = tables
        both = (a.double()[:, None] + b.double()[None]).flatten(0, 1)
        added += U * float(row_rms_max_upper(both)) * SLACK
        tables = sorted([both, *rest], key=len)
    apart = (sum(_longest(t) for t in tables) + added) * SLACK
    if len(tables) != 2 or apart == 0.0 or not bool(tables[0].any()):
        return apart  # with a table of zeros the sum of the two is the other one
    d = tables[0].shape[1]
    # Scaling by a power of two is exact, and then no square over- or underflows.
    e = torch.full((1,), math.frexp(apart)[1], device=tables[0].device)
    a = _times_power_of_two(tables[0].double()[None], -e)[0]
    squares_a, twice = a.square().sum(-1), 2.0 * a
    largest = longest = torch.zeros((), dtype=torch.float64, device=a.device)
    for part in tables[1].split(_ROWS):  # the longer table is never all in float64
        rows = _times_power_of_two(part.double()[None], -e)[0]
        squares = rows.square().sum(-1)
        sums = (rows @ twice.mT).add_(squares_a).add_(squares[:, None])
        largest, longest = (
            torch.maximum(largest, sums.amax()),
            torch.maximum(longest, squares.amax()),
        )
    product = float(squares_a.amax().sqrt() * longest.sqrt()) * SLACK
    # |a|^2 + 2 |a.b| + |b|^2 is at most largest + 4 product, because 2 |a.b| - 2 a.b is at most
    # 4 |a| |b|. Each computed sum is off by at most gamma_(d + 3) of that.
    rounding = (float(largest) + product) * gamma(4 * d + 16)
    together = _times_power_of_two((largest + rounding).div(d).sqrt()[None] * SLACK, e)
    return min(apart, (float(together) + added) * SLACK)
