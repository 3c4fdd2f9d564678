"""The seven maps (blocks, cap) -> blocks within the cap. Norm: RMS->RMS; maps act on sigma / cap.

Each map returns (factor, correction): the new block is factor * W + correction. So a block that
needs nothing is returned to the last bit, and a correction is added to the master weight, never
the other way round. `project` catches what a map leaves above the cap by a proven bound: the cap
is a guarantee.
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

# Relative overshoot of the cap that rounding may leave, by storage dtype. bf16 and fp16 lose up to
# 0.24 % when an orthogonal 1024 x 1024 is stored, so there the stored block is what is checked.
TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
)
# p(x) = x (1 - 3 y^2 + 3 y^3 - y^4), y = alpha x^2, has its one maximum at y = 1/3, where the
# bracket is 62/81. So an interval [0, x_max] can be mapped onto [0, 1] monotonically up to x_max =
# 81/62, with alpha = (1/3) / x_max^2 = 0.19530 there.
SOFT_CAP_MAX_INPUT = 81.0 / 62.0
_SLACK = 1e-5  # on bounds the caller knows: so one step's rounding cannot add to the next one's


@dataclass(frozen=True)
class _Call:
    """What a map may know, all [batch, 1, 1] float64: norms in units of the cap."""

    scale: Tensor  # sigma_max that is allowed: cap * sqrt(d_out / d_in)
    x_max: Tensor | None  # proven bound on the input's norm, if the caller knew one
    x_max_host: float  # the largest of them, on the host; inf if unknown or not known to the host
    decay: float  # 1 - lr * weight_decay


Result = tuple[Tensor | None, Tensor | None, bool]  # factor, correction, proven within the cap


@dataclass(frozen=True)
class Method:
    """One map of the singular values s, in units of the cap.

    Attributes:
        fn: (blocks, what is known) -> (factor, correction, proven).
        input_max: up to which norm (units of the cap) the map alone stays within the cap.
        overshoot: worst relative overshoot of the map there, in float32, before it is caught.
        doc: the map in words.
    """

    fn: Callable[[Tensor, _Call], Result]
    input_max: float
    overshoot: float
    doc: str


def soft_cap_alpha(x_max: float | Tensor) -> float | Tensor:
    """Least alpha for which p2(p1(.)) maps [0, x_max] (units of the cap) into [0, 1], rounded up.

    p1(x) = x - alpha x^3, p2(x) = x + alpha x^3. With y = alpha x_max^2 the condition p(x_max) = 1
    reads y^2 (3 - 3 y + y^2) = 1 - 1 / x_max; the left side is convex and increasing on [0, 1/3],
    so Newton from above stays above. 0 for x_max <= 1; alpha(81/62) = 0.1953 beyond 81/62, where
    the block has to be divided by x_max / (81/62) first. float for float, float64 tensor for
    tensor.
    """
    x = torch.as_tensor(x_max, dtype=torch.float64)
    x = x.clamp(1.0, SOFT_CAP_MAX_INPUT)
    r = (x - 1.0) / x
    y = (r / 2.1).sqrt()  # 3 - 3 y + y^2 >= 2.11 on [0, 1/3]: not below the root
    for _ in range(7):
        slope = y * (6.0 - 9.0 * y + 4.0 * y * y)
        y = y - (y * y * (3.0 - 3.0 * y + y * y) - r) / slope.clamp_min(1e-300)
    alpha = y / (x * x) * (1.0 + 1e-12)
    return alpha if isinstance(x_max, Tensor) else float(alpha)


def _gram_and_side(x: Tensor) -> tuple[Tensor, bool]:
    """(Gram matrix on the smaller side, whether it multiplies from the left)."""
    left = x.shape[-2] <= x.shape[-1]
    return (symmetric_product(x, x.mT) if left else symmetric_product(x.mT, x)), left


def _soft_cap(w: Tensor, call: _Call) -> Result:
    """p2(p1(s)) - s = -s y^2 (3 - 3 y + y^2), y = alpha s^2: two products on the smaller side."""
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
    """min(1, s), exactly, in float64: eigenvectors of the Gram matrix with s > 1, or a full SVD.

    Not by matrix signs: those need the distance of every s from 1, overshoot by 1 % (23 % in bf16)
    at inputs of norm 45 and lose values at 1. The Gram matrix squares the norm: beyond 1e4 an SVD.
    Blocks proven to be within the cap already are left alone.
    """
    inside = sigma_max_within(w, call.scale[:, 0, 0] * (1.0 + 0.5 * TOLERANCE[w.dtype]))
    todo = (~inside).nonzero()[:, 0]
    if len(todo) == 0:
        return None, None, True
    x = w[todo].double() / call.scale[todo]
    top = sigma_max_upper(x)
    # float64: 1e-6 below 1, so that the proof (5e-10 at 768) has room; float32's tolerance has it
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
    # Far above the cap W + correction cancels: there the result replaces W.
    factor, correction = torch.ones_like(call.scale), torch.zeros_like(w)
    factor[todo] = (top <= 2.0).double()[:, None, None]
    correction[todo] = ((new - x * factor[todo]) * call.scale[todo]).to(w.dtype)
    return factor, correction, False


def _spectral_normalize(w: Tensor, call: _Call) -> Result:
    """s / max(1, s_1), s_1 replaced by its proven upper bound (at most 0.1 % more)."""
    top = sigma_max_upper(w)[:, None, None] / call.scale
    return 1.0 / (top * (1.0 + 1e-14)).clamp_min(1.0), None, True


def _stiefel(w: Tensor, call: _Call) -> Result:
    """All s to 1 by eight Polar Express steps; zero directions stay zero."""
    polar = orthogonalize(w, "polar_express", steps=8, dtype=w.dtype)
    return torch.zeros_like(call.scale), polar * call.scale.to(w.dtype), False


def _move_top(w: Tensor, call: _Call, target: Callable[[Tensor], Tensor]) -> Result:
    """Add (target(s_1) - s_1) u v^T; whatever else is above the cap is left to be caught."""
    largest = largest_entry(w)
    some = largest > 0
    unit = w / torch.where(some, largest, torch.ones_like(largest))
    u, s, v = top_singular_triple(unit)
    units = (largest / call.scale).to(torch.float64)
    moved = (target(s.double() * units) - s.double() * units) * call.scale
    moved = torch.where(some, moved, torch.zeros_like(moved))
    return None, (u * moved.to(w.dtype)) @ v.mT, False


def _spectral_hammer(w: Tensor, call: _Call) -> Result:
    """Sets the largest s to 1, also from below; zero blocks stay zero."""
    return _move_top(w, call, torch.ones_like)


def _spectral_weight_decay(w: Tensor, call: _Call) -> Result:
    """s_1 (1 - lr wd); the others stay."""
    return _move_top(w, call, lambda s: s * call.decay)


def _weight_decay(w: Tensor, call: _Call) -> Result:
    """(1 - lr wd) s."""
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
    """`value` as a float64 tensor [batch, 1, 1]; refuses nan, inf and what is not above `least`."""
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
    """`w`, where not proven to be within scale * (1 + tolerance) divided by a proven bound."""
    inside = sigma_max_within(w, scale[:, 0, 0] * (1.0 + tolerance))
    if bool(inside.all()):
        return w
    # of all blocks, so that which ones fail does not change the shapes of the bound's products
    top = sigma_max_upper(w)
    factor = torch.where(inside, torch.ones_like(top), (scale[:, 0, 0] / top).clamp(max=1.0))
    return w * factor[:, None, None].to(w.dtype)


def _stored(w: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`w` rounded to a half precision, shrunk until that is proven to be within the cap."""
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
    """Blocks [..., d_out, d_in] brought within `cap` in the RMS->RMS norm, by one of `METHODS`.

    `cap`, and `norm_upper` (a proven bound on the norm of these blocks, if the caller knows one):
    numbers, or tensors of shape [...], in RMS->RMS units; lr in the same units per step. With
    `norm_upper` soft_cap, and weight_decay where it suffices, need no norm to be computed and no
    host synchronization; finiteness is then checked on a CPU only, elsewhere nan stays nan.

    Computed in float32 (float64 blocks in float64); new blocks of the same dtype and shape, whose
    norm is at most cap * (1 + TOLERANCE[dtype]); with `in_place` written into `blocks`, which are returned,
    to the same bits. Zero and empty blocks give themselves. Raises ConfigError (cap not positive,
    unknown method, lr * weight_decay outside [0, 1]) and NonFiniteError, before anything is written.
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
    if in_place and blocks.dtype == master:  # no copy
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
