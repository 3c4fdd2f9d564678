"""Largest eigenvalues of positive semidefinite matrices [batch, n, n]: estimated, and bounded.

The engine room of `norms`. Rounding: u = 2^-53 is float64's unit roundoff,
gamma_n = n u / (1 - n u). A computed dot product of length k, in any order of summation, with or
without FMA, is off by at most gamma_k |x|.|y| (Higham, "Accuracy and Stability of Numerical
Algorithms", 2nd ed., sections 3.1 and 3.5). Matrix products are assumed to be conventional ones (no
Strassen), as in MKL, OpenBLAS and cuBLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor

U = 2.0**-53  # unit roundoff of float64, round to nearest (IEEE 754)
SLACK = 1.0 + 2.0**-49  # covers 16 roundings of scalar float64 arithmetic, upwards
_EIGENVALUES_UP_TO = 128  # below this size all eigenvalues cost less than forty Lanczos steps
_LANCZOS_STEPS = 40  # flat tops are then known to 5e-4 of lambda_max, isolated ones to float32
_POWER_ROUNDS = 30
_POWER_WIDTH = 8


def gamma(n: int) -> float:
    """gamma_n = n u / (1 - n u), rounded up."""
    return n * U / (1.0 - n * U) * SLACK


def lambda_max_guess(g: Tensor) -> tuple[Tensor, Tensor]:
    """(guess, margin): guess * (1 + margin) is probably just above lambda_max; neither is a bound.

    `g` float64 of trace at most 1. The margin stays under 2e-3, which is 0.1 % of sigma_max.
    """
    if g.shape[-1] <= _EIGENVALUES_UP_TO:
        guess = torch.linalg.eigvalsh(g.nan_to_num())[:, -1]  # nan is refused later, by name
        return guess, torch.full_like(guess, 1e-6)
    guess, doubt = _lanczos_top(g.float())
    # measured: the error is at most 5.3 times the doubt on dense flat tops, far less elsewhere
    return guess, (6.0 * doubt / guess.clamp_min(1e-30)).clamp(1e-4, 1.9e-3)


def _lanczos_top(g: Tensor) -> tuple[Tensor, Tensor]:
    """(estimate, doubt) of lambda_max of float32 matrices: the doubt is how far it still moves.

    Neither is a bound. The start is a fixed pseudo-random vector, so that equal weights give equal
    bounds on every rank. No reorthogonalization: ghosts repeat the top Ritz value, harmlessly.
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
    """(bound, ok): where ok, lambda_max of the true Gram matrix is at most bound.

    Proof. Let A = fl(c I - g). The subtraction moves each diagonal entry by at most u c, since
    0 <= g_ii, and A's diagonal must be positive for the factorization to succeed. If Cholesky runs
    to its end then R^T R = A + D with norm2(D) <= gamma_{n+1} / (1 - gamma_{n+1}) * trace(A)
    (Higham, section 10.1.1; Rump, BIT 46 (2006) 433-452), and trace(A) <= n c (1 + u). As R^T R is
    positive semidefinite, lambda_max(g) <= c + u c + 2 gamma_{n+1} n c. The factor used here is
    8 (n + 1) in place of n + 1, so that blocked variants, which solve with inverted diagonal
    blocks, are covered too; at n = 768 it still adds only 5e-10 of c. `slack` bounds norm2(g -
    true Gram).
    """
    n = g.shape[-1]
    a = -g
    a.diagonal(dim1=-2, dim2=-1).add_(c[:, None])
    # a is symmetric: its transpose is column-major, what LAPACK takes without a copy of its own
    info = torch.linalg.cholesky_ex(a.mT).info
    bound = (c * (1.0 + U + 2.0 * n * gamma(8 * (n + 1))) + slack) * SLACK
    return bound, info == 0


def lambda_max_upper(g: Tensor, slack: Tensor) -> Tensor:
    """Proven upper bound of lambda_max of the true matrices behind `g` [batch, n, n], float64 [batch].

    `g` is symmetric, positive semidefinite but for rounding; `slack` bounds norm2(g - true). At most
    0.2 % too high. One host synchronization. nan and inf where g holds them: the caller refuses them.
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
    # no positive trace, so nothing but rounding: norm_F, with the n^2 roundings of its sum
    n = g.shape[-1]
    return torch.where(
        zero, torch.linalg.matrix_norm(g) * ((1.0 + gamma(n * n + 8)) * SLACK) + slack, bound
    )


def lambda_max_upper_slow(g: Tensor, slack: Tensor, wide: Tensor) -> Tensor:
    """Bounds of lambda_max for the few whose guess was too low; `wide` is tried first."""
    bound, ok = proven_lambda_max(g, wide, slack)
    if bool(ok.all()):
        return bound
    top = torch.linalg.eigvalsh(g)[:, -1]
    bound, ok = proven_lambda_max(g, top * (1.0 + 1e-6), slack)
    return torch.where(ok, bound, (gram_iteration(g, 12) + slack) * SLACK)


def gram_iteration(g: Tensor, rounds: int) -> Tensor:
    """Proven upper bound of lambda_max of symmetric positive semidefinite float64 [batch, n, n].

    Forwards X_0 = g / f_0, X_{i+1} = X_i^2 / f_{i+1}, f the Frobenius norm each time. Backwards
    from norm2(X_K) <= norm_F(X_K) <= 1 + tiny: X_i is symmetric, so norm2(X_i)^2 = norm2(X_i^2)
    <= f_{i+1} norm2(X_{i+1}) + gamma_{n+2} norm_F(X_i)^2, the last term being the rounding of the
    product and of the division. f stays above 1 / sqrt(n), so nothing underflows.
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
    # norm_F of the computed X_K: n^2 roundings of the sum, and of each entry
    top = torch.linalg.vector_norm(x, dim=(-2, -1)) * (1.0 + gamma(n * n + 8))
    for f in reversed(scales[1:]):
        top = (f * top + product).sqrt() * SLACK
    return scales[0] * (top + product) * SLACK


def top_singular_triple(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u, s, v): v the top Ritz vector of a block power iteration, s = norm2(x v), u = x v / s."""
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
