"""The seven projections: maps that bring blocks within a cap in the RMS->RMS norm.

`project` is the function to call, and `METHODS` lists the maps. All of them act on the singular
values, in units of the cap: s = sigma / (the sigma that the cap allows).

Each map returns (factor, correction), and the new block is factor * W + correction. So a block that
needs nothing keeps every bit, and a correction is added to the master weight, never the other way
round. What a map leaves above the cap is found by a proven bound and divided by it, so the cap is a
guarantee.

Source: the methods are those of arXiv 2507.13338. docs/maths.md, section 8, says why the caps hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lip_plugin.errors import ConfigError
from lip_plugin.linalg.norms import refuse_non_finite_blocks, sigma_max_upper, sigma_max_within
from lip_plugin.linalg.polar import largest_entry, orthogonalize
from lip_plugin.linalg.precision import without_autocast
from lip_plugin.linalg.spectrum import top_singular_triple
from lip_plugin.linalg.symmetric import product, symmetric_product

# By how much rounding may leave a block above its cap, relative to the cap, by storage dtype.
# Storing an orthogonal 1024 x 1024 matrix in bf16 or fp16 moves its norm by up to 0.24 %, so there
# it is the stored block that is checked.
TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
)
# The soft cap p(x) = x (1 - 3 y^2 + 3 y^3 - y^4), with y = alpha x^2, has its one maximum at
# y = 1/3, where the bracket is 62/81. So an interval [0, x_max] can be mapped onto [0, 1]
# monotonically up to x_max = 81/62. There alpha = (1/3) / x_max^2 = 0.19530.
SOFT_CAP_MAX_INPUT = 81.0 / 62.0
# Added to bounds that the caller knows, so that the rounding of one step cannot add to the next
# one's.
_SLACK = 1e-5


@dataclass(frozen=True)
class _Call:
    """What a map may know about the blocks. Tensors are [batch, 1, 1], float64."""

    scale: Tensor  # the sigma_max that is allowed: cap * sqrt(d_out / d_in)
    x_max: Tensor | None  # the caller's proven bound on the norm in units of the cap, or None
    x_max_host: float  # the same for all blocks, where the host knows it without asking; else inf
    decay: float  # 1 - lr * weight_decay


Result = tuple[Tensor | None, Tensor | None, bool]  # factor, correction, proven within the cap


@dataclass(frozen=True)
class Method:
    """One map of the singular values s, in units of the cap.

    Attributes:
        fn: (blocks, what is known about them) -> (factor, correction, proven). The last is whether
            the result is proven to be within the cap.
        input_max: Up to which norm of the input, in units of the cap, the map alone stays within
            it.
        overshoot: The worst relative overshoot of the map there in float32, before it is caught.
        doc: The map in words.
    """

    fn: Callable[[Tensor, _Call], Result]
    input_max: float
    overshoot: float
    doc: str


def soft_cap_alpha(x_max: float | Tensor) -> float | Tensor:
    """The least alpha for which the soft cap maps [0, x_max] into [0, 1], rounded up.

    The soft cap is p(x) = p2(p1(x)) with p1(x) = x - alpha x^3 and p2(x) = x + alpha x^3, and x is
    in units of the cap. With y = alpha x_max^2 the condition p(x_max) = 1 reads
    y^2 (3 - 3 y + y^2) = 1 - 1 / x_max. The left side is convex and increasing on [0, 1/3], so
    Newton's method that starts above the root stays above it.

    alpha is 0 for x_max <= 1. From 81/62 on it stays at alpha(81/62) = 0.1953; there the block has
    to be divided by x_max / (81/62) first.

    Args:
        x_max: The largest norm of the input, in units of the cap. A float, or a float64 tensor.

    Returns:
        alpha, as a float for a float and as a tensor for a tensor.

    Source: the soft cap is that of arXiv 2507.13338. docs/maths.md, section 8, has the proof.
    """
    x = torch.as_tensor(x_max, dtype=torch.float64)
    x = x.clamp(1.0, SOFT_CAP_MAX_INPUT)
    r = (x - 1.0) / x
    y = (r / 2.1).sqrt()  # above the root, because 3 - 3 y + y^2 >= 2.11 on [0, 1/3]
    for _ in range(7):
        slope = y * (6.0 - 9.0 * y + 4.0 * y * y)
        y = y - (y * y * (3.0 - 3.0 * y + y * y) - r) / slope.clamp_min(1e-300)
    alpha = y / (x * x) * (1.0 + 1e-12)
    return alpha if isinstance(x_max, Tensor) else float(alpha)


def _gram_and_side(x: Tensor) -> tuple[Tensor, bool]:
    """(Gram matrix on the smaller side, whether it multiplies the block from the left)."""
    left = x.shape[-2] <= x.shape[-1]
    return (symmetric_product(x, x.mT) if left else symmetric_product(x.mT, x)), left


def _soft_cap(w: Tensor, call: _Call) -> Result:
    """The soft cap p2(p1(s)), by matrix products alone.

    The correction is p2(p1(s)) - s = -s y^2 (3 - 3 y + y^2) with y = alpha s^2. Beyond the Gram
    matrix it takes two products on the smaller side, and one with the block.
    """
    if call.x_max is None:
        x_max = sigma_max_upper(w)[:, None, None] / call.scale * (1.0 + 1e-14)
    else:
        x_max = call.x_max + _SLACK
    factor: Tensor | None = None
    if call.x_max_host + _SLACK > SOFT_CAP_MAX_INPUT:
        factor = (SOFT_CAP_MAX_INPUT / x_max).clamp(max=1.0)
    alpha = soft_cap_alpha(x_max)
    assert isinstance(alpha, Tensor)
    x = w * ((1.0 if factor is None else factor) / call.scale).to(w.dtype)
    y, left = _gram_and_side(x)
    y.mul_(alpha.to(y.dtype))
    y2 = symmetric_product(y, y)
    inner = torch.add(y2, y, alpha=-3.0)
    inner.diagonal(dim1=-2, dim2=-1).add_(3.0)
    change = symmetric_product(y2, inner).mul_((-call.scale).to(y.dtype))
    return factor, product(change, x) if left else product(x, change), True


def _hard_cap(w: Tensor, call: _Call) -> Result:
    """min(1, s), exactly, in float64.

    It uses the eigenvectors of the Gram matrix, or a full SVD. Matrix signs are not used: they need
    the distance of every s from 1, they overshoot by 1 % (23 % in bf16) at inputs of norm 45, and
    they lose values at 1. The Gram matrix squares the norm, so beyond 1e4 the SVD is taken. Blocks
    that are proven to be within the cap already are left alone.
    """
    inside = sigma_max_within(w, call.scale[:, 0, 0] * (1.0 + 0.5 * TOLERANCE[w.dtype]))
    todo = (~inside).nonzero()[:, 0]
    if len(todo) == 0:
        return None, None, True
    x = w[todo].double() / call.scale[todo]
    top = sigma_max_upper(x)
    # In float64 the target is 1e-6 below 1, so that the proof, which is 5e-10 too high at n = 768,
    # has room. In float32 the tolerance has that room.
    level = 1.0 - 1e-6 if w.dtype == torch.float64 else 1.0
    if float(top.max()) > 1e4:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        new = (u * s.clamp(max=level)[:, None, :]) @ v
    else:
        g, left = _gram_and_side(x)
        t, vectors = torch.linalg.eigh(g)
        ratio = level / t.clamp_min(level * level).sqrt() - 1.0
        on_side = (vectors * ratio[:, None, :]) @ vectors.mT
        new = x + (on_side @ x if left else x @ on_side)
    # For blocks far above the cap, W + correction would cancel digits. There the result replaces W.
    factor, correction = torch.ones_like(call.scale), torch.zeros_like(w)
    factor[todo] = (top <= 2.0).double()[:, None, None]
    correction[todo] = ((new - x * factor[todo]) * call.scale[todo]).to(w.dtype)
    return factor, correction, False


def _spectral_normalize(w: Tensor, call: _Call) -> Result:
    """s / max(1, s_1), with a proven upper bound (at most 0.1 % above) in place of s_1."""
    top = sigma_max_upper(w)[:, None, None] / call.scale
    return 1.0 / (top * (1.0 + 1e-14)).clamp_min(1.0), None, True


def _stiefel(w: Tensor, call: _Call) -> Result:
    """All s become 1, by eight Polar Express steps. Zero directions stay zero.

    `orthogonalize` is at most 1 in real arithmetic, and 1 + 1e-6 as computed in float32. In float64
    that is more than the tolerance, so there the result is measured.
    """
    on_cpu = w.device.type == "cpu"
    polar = orthogonalize(w, "polar_express", steps=8, dtype=w.dtype, check_finite=on_cpu)
    return torch.zeros_like(call.scale), polar * call.scale.to(w.dtype), w.dtype != torch.float64


def _move_top(w: Tensor, call: _Call, target: Callable[[Tensor], Tensor]) -> Result:
    """Add (target(s_1) - s_1) u v^T. Other s above the cap are left for `project` to catch."""
    largest = largest_entry(w)
    some = largest > 0
    unit = w / torch.where(some, largest, torch.ones_like(largest))
    u, s, v = top_singular_triple(unit)
    units = (largest / call.scale).to(torch.float64)
    moved = (target(s.double() * units) - s.double() * units) * call.scale
    moved = torch.where(some, moved, torch.zeros_like(moved))
    return None, (u * moved.to(w.dtype)) @ v.mT, False


def _spectral_hammer(w: Tensor, call: _Call) -> Result:
    """The largest s becomes 1, also from below. Zero blocks stay zero."""
    return _move_top(w, call, torch.ones_like)


def _spectral_weight_decay(w: Tensor, call: _Call) -> Result:
    """The largest s becomes s_1 (1 - lr wd). The others stay."""
    return _move_top(w, call, lambda s: s * call.decay)


def _weight_decay(w: Tensor, call: _Call) -> Result:
    """Every s becomes (1 - lr wd) s."""
    inside = call.x_max_host * call.decay <= 1.0 + 0.9 * TOLERANCE[w.dtype]
    return torch.full_like(call.scale, call.decay), None, inside


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "weight_decay": Method(_weight_decay, 1.0, 1e-6, "(1 - lr wd) s"),
        "spectral_weight_decay": Method(
            _spectral_weight_decay, 1.0, 1e-5, "the largest becomes s_1 (1 - lr wd)"
        ),
        "spectral_normalize": Method(_spectral_normalize, math.inf, 1e-6, "s / max(1, s_1)"),
        "stiefel": Method(_stiefel, math.inf, 1e-6, "1, for s above 1e-3 of the largest"),
        "spectral_hammer": Method(_spectral_hammer, 1.0, 1e-2, "the largest becomes 1"),
        "hard_cap": Method(_hard_cap, math.inf, 1e-5, "min(1, s), exactly"),
        "soft_cap": Method(
            _soft_cap, math.inf, 1e-5, "p2(p1(s)), least alpha for the input's norm"
        ),
    }
)


def _per_block(value: float | Tensor, blocks: Tensor, name: str, least: float) -> Tensor:
    """`value` as a float64 tensor [batch, 1, 1].

    Raises ConfigError for nan, inf, and what is not above `least`.
    """
    shape = blocks.shape[:-2]
    if isinstance(value, Tensor):
        bad = bool((~(value > least) | ~value.isfinite()).any())
        each = value.detach().to(blocks.device, torch.float64).expand(shape)
    else:
        bad = not (value > least and math.isfinite(value))
        each = torch.full(shape, float(value), dtype=torch.float64, device=blocks.device)
    if bad:
        raise ConfigError(f"{name} must be finite and greater than {least:g}, got {value}")
    return each.reshape(-1, 1, 1)


def _caught(w: Tensor, scale: Tensor, tolerance: float) -> Tensor:
    """`w`, in which blocks that are not proven to be within the cap are divided by a proven bound.

    The cap counts here as scale * (1 + tolerance).
    """
    inside = sigma_max_within(w, scale[:, 0, 0] * (1.0 + tolerance))
    if bool(inside.all()):
        return w
    # The bound is computed for all blocks, so that its products have the same shapes whichever
    # blocks fail.
    top = sigma_max_upper(w)
    factor = torch.where(inside, torch.ones_like(top), (scale[:, 0, 0] / top).clamp(max=1.0))
    return w * factor[:, None, None].to(w.dtype)


def _stored(w: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`w` rounded to a half precision, and shrunk until that is proven to be within the cap."""
    limit = scale[:, 0, 0] * (1.0 + TOLERANCE[dtype])
    for attempt in range(1, 20):
        narrow = w.to(dtype)
        inside = sigma_max_within(narrow, limit)
        if bool(inside.all()):
            return narrow
        factor = (scale[:, 0, 0] / sigma_max_upper(narrow)).clamp(max=1.0) * (1.0 - 1e-4 * attempt)
        w = torch.where(inside[:, None, None], w, w * factor[:, None, None].to(w.dtype))
    raise ConfigError(f"a cap is too small for blocks of {dtype}: its smallest numbers exceed it")


@torch.no_grad()
@without_autocast
def project(
    blocks: Tensor,
    cap: float | Tensor,
    method: str = "soft_cap",
    *,
    lr: float = 0.0,
    weight_decay: float = 0.0,
    norm_upper: float | Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """Bring blocks within a cap in the RMS->RMS norm, by one of `METHODS`.

    The computation is in float32, or in float64 for float64 blocks. If the caller knows a proven
    bound on the norm of the blocks, then soft_cap need not compute one, and neither need
    weight_decay where that bound suffices. No synchronization with the host is needed then. Whether
    the blocks are finite is in that case checked on a CPU only; elsewhere nan stays nan.

    Args:
        blocks: [..., d_out, d_in], floats. Zero and empty blocks give themselves.
        cap: The largest RMS->RMS norm: a number, or a tensor [...].
        method: A key of METHODS.
        lr: The learning rate of the two methods that decay, in RMS->RMS norm per step.
        weight_decay: Of these two methods, too.
        norm_upper: A proven bound on the RMS->RMS norm of these very blocks: a number, a tensor
            [...], or None if none is known.
        in_place: Write the result into `blocks` and return them. The bits are the same.

    Returns:
        Blocks of the same dtype and shape, of norm at most cap * (1 + TOLERANCE[dtype]).

    Raises:
        ConfigError: The cap is not positive, the method is unknown, or lr * weight_decay is outside
            [0, 1]. Nothing has been written.
        NonFiniteError: A block holds nan or inf. Nothing has been written.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown projection {method!r}: choose one of {', '.join(METHODS)}")
    if blocks.dtype not in TOLERANCE or blocks.dim() < 2:
        raise ConfigError(f"expected floats [..., d_out, d_in], got {blocks.dtype} {blocks.shape}")
    if not 0.0 <= lr * weight_decay <= 1.0:
        raise ConfigError(f"lr * weight_decay must lie in [0, 1], got {lr} * {weight_decay}")
    caps = _per_block(cap, blocks, "cap", 0.0)
    known = None if norm_upper is None else _per_block(norm_upper, blocks, "norm_upper", -1e-300)
    if blocks.numel() == 0:
        return blocks if in_place else blocks.clone()
    d_out, d_in = blocks.shape[-2:]
    master = torch.promote_types(blocks.dtype, torch.float32)
    w = blocks.reshape(-1, d_out, d_in).to(master)
    if known is None or w.device.type == "cpu":
        refuse_non_finite_blocks(largest_entry(w))
    x_max_host = math.inf
    if isinstance(norm_upper, (int, float)) and isinstance(cap, (int, float)):
        x_max_host = norm_upper / cap
    x_max = None if known is None else known / caps
    call = _Call(caps * math.sqrt(d_out / d_in), x_max, x_max_host, 1.0 - lr * weight_decay)
    factor, correction, proven = METHODS[method].fn(w, call)
    new = w
    if in_place and blocks.dtype == master:  # writes to `blocks` without a copy
        new = new if factor is None else new.mul_(factor.to(master))
        new = new if correction is None else new.add_(correction)
    else:
        new = new if factor is None else new * factor.to(master)
        new = new if correction is None else new + correction
    if not proven or torch.get_float32_matmul_precision() != "highest":
        new = _caught(new, call.scale, 0.9 * TOLERANCE[master])
    if blocks.dtype != master:
        new = _stored(new, call.scale, blocks.dtype)
    if in_place:
        return (
            blocks
            if new.data_ptr() == blocks.data_ptr()
            else blocks.copy_(new.reshape(blocks.shape))
        )
    return (new.clone() if new is w else new).reshape(blocks.shape)
