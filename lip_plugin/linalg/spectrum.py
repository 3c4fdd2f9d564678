"""Largest eigenvalues of positive semidefinite matrices [batch, n, n]: guessed, and then proven.

This is the machinery behind `norms`. A guess comes from Lanczos or from all eigenvalues. The proof
is one Cholesky factorization, which succeeds only if the guess was high enough.

Rounding: u = 2^-53 is the unit roundoff of float64, and gamma_n = n u / (1 - n u). A computed dot
product of length k is off by at most gamma_k |x|.|y|, in any order of summation, with or without
FMA. Matrix products are assumed to be conventional ones, not Strassen's, as in MKL, OpenBLAS and
cuBLAS.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., sections 3.1 and 3.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

U = 2.0**-53  # unit roundoff of float64, round to nearest (IEEE 754)
SLACK = 1.0 + 2.0**-49  # as a factor, makes up for 16 roundings of scalar float64 arithmetic
_EIGENVALUES_UP_TO = 128  # below this size all eigenvalues cost less than forty Lanczos steps
# After 40 steps a flat top of the spectrum is known to 5e-4 of lambda_max, and an isolated largest
# eigenvalue to float32's precision.
_LANCZOS_STEPS = 40
_POWER_ROUNDS = 30
_POWER_WIDTH = 8


def gamma(n: int) -> float:
    """gamma_n = n u / (1 - n u), rounded up."""
    return n * U / (1.0 - n * U) * SLACK


def lambda_max_guess(g: Tensor) -> tuple[Tensor, Tensor]:
    """A guess of the largest eigenvalue, and a margin. Neither is a bound.

    guess * (1 + margin) is probably just above lambda_max. The margin stays under 2e-3, which is
    0.1 % of sigma_max.

    Args:
        g: float64 [batch, n, n], of trace at most 1.

    Returns:
        (guess, margin), both float64 [batch].
    """
    if g.shape[-1] <= _EIGENVALUES_UP_TO:
        guess = torch.linalg.eigvalsh(g.nan_to_num())[:, -1]  # callers refuse nan later, by name
        return guess, torch.full_like(guess, 1e-6)
    guess, doubt = _lanczos_top(g.float())
    # Measured: on dense flat tops the error is at most 5.3 times the doubt, elsewhere far less.
    return guess, (6.0 * doubt / guess.clamp_min(1e-30)).clamp(1e-4, 1.9e-3)


def _lanczos_top(g: Tensor) -> tuple[Tensor, Tensor]:
    """(estimate, doubt) of lambda_max of float32 matrices. Neither is a bound.

    The doubt is how much the estimate still moved over the last six steps. The start is a fixed
    pseudo-random vector, so that equal weights give equal bounds on every rank. Nothing is
    reorthogonalized: that lets the top Ritz value appear several times, which does no harm.
    """
    n = g.shape[-1]
    steps = min(n, _LANCZOS_STEPS)
    start = torch.randn(n, 1, generator=torch.Generator().manual_seed(0)).to(g.device)
    v = (start / start.norm()).expand(g.shape[0], n, 1)
    before = torch.zeros_like(v)
    t = g.new_zeros(g.shape[0], steps, steps)
    beta = g.new_zeros(g.shape[0], 1, 1)
    for i in range(steps):
        r = g @ v - beta * before
        alpha = v.mT @ r
        r = r - alpha * v
        t[:, i, i] = alpha[:, 0, 0]
        beta = torch.linalg.vector_norm(r, dim=-2, keepdim=True)
        if i + 1 < steps:
            t[:, i, i + 1] = t[:, i + 1, i] = beta[:, 0, 0]
        before, v = v, r / beta.clamp_min(1e-30)
    early = max(1, steps - 6)
    t = t.double().nan_to_num()
    top = torch.linalg.eigvalsh(t)[:, -1]
    return top, top - torch.linalg.eigvalsh(t[:, :early, :early])[:, -1]


def proven_lambda_max(g: Tensor, c: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """An upper bound of the largest eigenvalue, and for which matrices it is proven.

    Proof. Let A = fl(c I - g). The subtraction moves each diagonal entry by at most u c, because 0
    <= g_ii, and because the factorization only succeeds if the diagonal of A is positive. If
    Cholesky runs to its end, then R^T R = A + D with norm2(D) <= gamma_{n+1} / (1 - gamma_{n+1}) *
    trace(A), and trace(A) <= n c (1 + u). Since R^T R is positive semidefinite, lambda_max(g) <= c
    + u c + 2 gamma_{n+1} n c. The code uses 8 (n + 1) in place of n + 1. That covers blocked
    variants too, which solve with inverted diagonal blocks, and at n = 768 it adds only 5e-10 of c.

    Args:
        g: Computed Gram matrices, float64 [batch, n, n].
        c: float64 [batch], what to prove.
        slack: float64 [batch], a bound on norm2(g - true Gram matrix).

    Returns:
        (bound, ok). Where ok is True, lambda_max of the true Gram matrix is at most bound.

    Source: Higham, section 10.1.1; Rump, BIT 46 (2006) 433-452.
    """
    n = g.shape[-1]
    a = -g
    a.diagonal(dim1=-2, dim2=-1).add_(c[:, None])
    # a is symmetric. Its transpose is column-major, which LAPACK takes without a copy of its own.
    info = torch.linalg.cholesky_ex(a.mT).info
    bound = (c * (1.0 + U + 2.0 * n * gamma(8 * (n + 1))) + slack) * SLACK
    return bound, info == 0


def lambda_max_upper(g: Tensor, slack: Tensor) -> Tensor:
    """Proven upper bound of lambda_max of the true matrices behind `g`, at most 0.2 % too high.

    It costs one synchronization with the host.

    Args:
        g: float64 [batch, n, n], symmetric, and positive semidefinite but for rounding.
        slack: float64 [batch], a bound on norm2(g - true matrix).

    Returns:
        float64 [batch]. It is nan or inf where g holds such; the caller has to refuse them.
    """
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
    zero = trace <= 0
    one = torch.ones_like(trace)
    safe = torch.where(zero, one, trace)
    guess, margin = lambda_max_guess(g / safe[:, None, None])
    guess = torch.where(zero, one, guess * safe)
    bound, ok = proven_lambda_max(g, guess * (1.0 + margin), slack)
    failed = ~(ok | zero)
    if bool(failed.any()):
        at = (failed & trace.isfinite()).nonzero()[:, 0]
        if len(at):
            bound[at] = lambda_max_upper_slow(g[at], slack[at], 1.0019 * guess[at])
    # A matrix without a positive trace holds nothing but rounding. There the bound is norm_F,
    # widened by the n^2 roundings of its sum.
    n = g.shape[-1]
    return torch.where(
        zero, torch.linalg.matrix_norm(g) * ((1.0 + gamma(n * n + 8)) * SLACK) + slack, bound
    )


def lambda_max_upper_slow(g: Tensor, slack: Tensor, wide: Tensor) -> Tensor:
    """Proven bounds of lambda_max for the few matrices whose first guess was too low.

    `wide` is tried first, then the eigenvalues in float64, and last Gram iteration.
    """
    bound, ok = proven_lambda_max(g, wide, slack)
    if bool(ok.all()):
        return bound
    top = torch.linalg.eigvalsh(g)[:, -1]
    bound, ok = proven_lambda_max(g, top * (1.0 + 1e-6), slack)
    return torch.where(ok, bound, (gram_iteration(g, 12) + slack) * SLACK)


def gram_iteration(g: Tensor, rounds: int) -> Tensor:
    """Proven upper bound of lambda_max of symmetric positive semidefinite float64 [batch, n, n].

    Forwards, X_0 = g / f_0 and X_{i+1} = X_i^2 / f_{i+1}, where f is the Frobenius norm of what it
    divides. So norm2(X_K) <= norm_F(X_K) <= 1 + tiny for the last one. The bound goes backwards
    from there: X_i is symmetric, so norm2(X_i)^2 = norm2(X_i^2) <= f_{i+1} norm2(X_{i+1}) +
    gamma_{n+2} norm_F(X_i)^2. The last term is the rounding of the product and of the division. f
    stays above 1 / sqrt(n), so nothing underflows.
    """
    n = g.shape[-1]
    product = gamma(2 * n + 8)
    scales = []
    x = g
    for i in range(rounds + 1):
        if i:
            x = x @ x
            x = (x + x.mT) * 0.5
        f = torch.linalg.vector_norm(x, dim=(-2, -1))
        f = torch.where(f == 0, torch.ones_like(f), f)
        scales.append(f)
        x = x / f[:, None, None]
    # norm_F of the computed X_K, widened by the n^2 roundings of its sum and by those of each
    # entry.
    top = torch.linalg.vector_norm(x, dim=(-2, -1)) * (1.0 + gamma(n * n + 8))
    for f in reversed(scales[1:]):
        top = (f * top + product).sqrt() * SLACK
    return scales[0] * (top + product) * SLACK


def top_singular_triple(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate of the largest singular value and its vectors, by block power iteration.

    Returns:
        (u, s, v): v is the top Ritz vector, s = norm2(x v), and u = x v / s. No bound.
    """
    if x.shape[-2] < x.shape[-1]:
        v, s, u = top_singular_triple(x.mT)
        return u, s, v
    g = x.mT @ x
    n = g.shape[-1]
    g = g / torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    start = torch.randn(n, min(n, _POWER_WIDTH), generator=torch.Generator().manual_seed(0))
    q = start.to(g.device, g.dtype).expand(len(g), -1, -1)
    for _ in range(_POWER_ROUNDS):
        q = torch.linalg.qr(g @ (g @ q)).Q
    ritz = torch.linalg.eigh(q.mT @ (g @ q))[1]
    v = q @ ritz[..., -1:]
    image = x @ v
    s = torch.linalg.vector_norm(image, dim=-2, keepdim=True)
    return image / s.clamp_min(1e-30), s, v
