"""peft's LoRA on a constrained model: every block of W0 + s B A within its cap, in the RMS->RMS norm.

    retrofit(base); model = get_peft_model(base, LoraConfig(...)); attach_projection(optimizer, model)

After each step B is replaced by a point of {B : norm(W0_b + s B_b A) <= cap for every block b}, with
A fixed; blocks differ in rows of B, so each is a problem of its own (lip_plugin/linalg/low_rank.py, with
s A = R Q^T and E = B R). What is feasible keeps every bit.

A base AT its caps leaves little room: scaling B would give nothing at all, since almost every
direction leaves the ball. Z(l) keeps what turns or shrinks the singular directions that A reads and
filters out what would lengthen them: training goes on, slower. The cure is room: retrofit with a
`w_max` above the norms of the base. `project_adapters` says what is refused.

Nothing here imports peft: its layers are told by their attributes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lip_plugin.blocks import Segment
from lip_plugin.certificate.maps import register_weight_reader
from lip_plugin.errors import ConfigError, TrainerError, UnsupportedModelError
from lip_plugin.linalg.low_rank import LowRankProblem, Spectrum
from lip_plugin.linalg.norms import rms_to_rms_upper
from lip_plugin.modules import Constrained, entry_cap
from lip_plugin.optim.batches import refuse_sharded
from lip_plugin.optim.projection import BlockNorms, check_finite, register_projector, require_retrofit

ACCEPT = 1.0 + 1e-4  # largest eigenvalue of T that is left alone: norm <= cap * (1 + 5e-5)
BASE_TOLERANCE = 1e-3  # a base may exceed its cap by what storage in bf16 does to it
_ROOM = 1e-5  # a base at its cap is given this much, so that C is positive definite
_FAR = 1e3  # deltas longer than this many caps are shortened first, so that Z(l) does not cancel
# What is tried in turn on a block that is above its cap: the projection, again (what rounding to the
# adapter's dtype left), then shorter deltas. W0 is feasible and the set convex, so it ends.
_ATTEMPTS = (None, None, 0.98, 0.9, 0.5, 0.1, 0.0)


_CACHE: WeakKeyDictionary[nn.Module, tuple[tuple, list[Spectrum]]] = WeakKeyDictionary()


class _Adapted:
    """One LoRA layer: its movable adapters side by side, float64."""

    def __init__(self, name: str, layer: Any) -> None:
        if layer.merged:
            _CACHE.pop(layer, None)  # peft merges through .data, which leaves no mark on the tensor
            raise TrainerError(f"{name}: adapters are merged into W0. Call model.unmerge_adapter() first.")
        self.name, self.layer, self.layout = name, layer, layer.base_layer.layout
        active = _active(layer)
        movable = [a for a in active if layer.lora_B[a].weight.requires_grad] or active
        self.fixed = [a for a in active if a not in movable]
        pairs = {a: (layer.lora_A[a].weight, layer.lora_B[a].weight) for a in active}
        self.factors = [(*pairs[a], layer.scaling[a]) for a in movable if layer.scaling[a]]
        self.named = [
            (f"{name}.lora_{x}.{a}", t) for a in active for x, t in zip("AB", pairs[a], strict=True)
        ]
        for _, tensor in [*self.named, (name, layer.base_layer.weight)]:
            refuse_sharded(tensor)

    def prepare(self) -> None:
        """Coordinates of A, and everything of W0 that does not change with B."""
        weight = self.layer.base_layer.weight.detach()
        if self.fixed:
            weight = _with_deltas(self.layer, self.fixed, torch.promote_types(weight.dtype, torch.float32))
        rows = torch.cat([a.detach().double() for a, _, _ in self.factors])
        q, r = torch.linalg.qr(rows.T)
        u, s, v = torch.linalg.svd(r, full_matrices=False)
        kept = s > 1e-13 * s.max()
        self.into = v.T * (s * kept)  # E = B into; B changes by (change of E) back
        self.back = torch.where(kept, 1.0 / s, 0.0)[:, None] * v
        spectra = _spectra(self.name, self.layer, weight, self.fixed)
        q = (q @ u) * kept
        wide = torch.promote_types(weight.dtype, torch.float32)
        y = (self.layout.matrix(weight).to(wide) @ q.to(wide)).double()
        views = zip(_capped(self.layout, weight), spectra, strict=True)
        self.pieces = [_Piece(self, segment, view, spectrum, y) for (segment, view), spectrum in views]

    def b(self, rows: slice) -> Tensor:
        """Scaled B of all movable adapters, [rows, total rank]."""
        return torch.cat([b.detach()[rows].double() * s for _, b, s in self.factors], dim=1)

    def write(self, rows: Tensor, new: Tensor) -> None:
        """Put rows of the scaled B back into the adapters."""
        parts = new.split([b.shape[1] for _, b, _ in self.factors], dim=1)
        for (_, b, s), part in zip(self.factors, parts, strict=True):
            b[rows] = (part / s).to(b.dtype)


class _Piece:
    """The blocks of one segment of one layer."""

    def __init__(self, owner: _Adapted, segment: Segment, w: Tensor, spectrum: Spectrum, y: Tensor) -> None:
        self.owner, self.segment, self.w, self.spectrum = owner, segment, w, spectrum
        self.rows = slice(segment.start, segment.stop)
        self.tall = w.shape[-2] > w.shape[-1]
        self.y = self._blocks(y[self.rows])
        self.hat_y = self._hat(self.y)

    def _blocks(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.segment.count, self.segment.d_out))

    def _hat(self, x: Tensor) -> Tensor:
        basis = self.spectrum.basis
        x = x.to(basis.dtype)
        return (basis.mT @ (self.w.mT.to(basis.dtype) @ x if self.tall else x)).double()

    def problem(self) -> LowRankProblem:
        """The question whether these blocks, as stored now, are within their caps."""
        e = self._blocks(self.owner.b(self.rows) @ self.owner.into)
        size = torch.linalg.vector_norm(e, dim=(-2, -1))
        self.short = (_FAR * self.spectrum.ceiling.sqrt() / size.clamp_min(1e-300)).clamp(max=1.0)
        self.z = self.y + e * self.short[:, None, None]
        self.x = torch.cat([self.y, self.z], dim=-1)
        hat = torch.cat([self.hat_y, self._hat(self.z)], dim=-1)
        return LowRankProblem(hat, self.x.mT @ self.x, self.spectrum.energy, self.spectrum.ceiling, self.tall)

    def move(self, at: Tensor, hat: Tensor, shift: Tensor, g: Tensor) -> None:
        """Give blocks number `at` the B of Z(l) = Z - l (C + l)^-1 [Y, Z] G."""
        mu = (self.spectrum.ceiling[at] + shift)[:, None]
        inner = (hat @ g) / (mu - self.spectrum.energy[at])[:, :, None]
        basis = self.spectrum.basis
        change = basis[at] @ inner.to(basis.dtype)
        if self.tall:
            change = (self.x[at] @ g + self.w[at].to(basis.dtype) @ change) / mu[:, :, None]
        change = -shift[:, None, None] * change
        old = self._blocks(self.owner.b(self.rows))[at] * self.short[at, None, None]
        self._write(at, old + change @ self.owner.back)

    def shorten(self, at: Tensor, factor: float) -> None:
        """Multiply B of blocks number `at`."""
        self._write(at, self._blocks(self.owner.b(self.rows))[at] * factor)

    def _write(self, at: Tensor, new: Tensor) -> None:
        first = self.segment.start + at * self.segment.d_out
        rows = first[:, None] + torch.arange(self.segment.d_out, device=at.device)
        self.owner.write(rows.flatten(), new.flatten(0, 1))


@torch.no_grad()
def project_adapters(model: nn.Module, method: str | None = None, lr: float = 0.0) -> int:
    """Bring every block of W0 + s B A within its cap * (1 + 1e-4), RMS->RMS, by changing B only.

    Adapters that are active and trainable move together (all active ones, if none is trainable);
    frozen active ones count as part of W0; inactive ones are not looked at. `method` and `lr` are
    not used: on the adapters there is one map. Called by every projection of a retrofitted model.

    Returns:
        The number of blocks looked at.

    Raises:
        UnsupportedModelError: an adapter without a rule: not LoRA, a variant of it (DoRA and its
            like), on an embedding, or on a layer without a cap.
        ConfigError: W0 is above its cap. TrainerError: adapters are merged into W0.
        NonFiniteError: a factor holds nan or inf. No adapter was changed.
    """
    adapted = [a for a in (_Adapted(n, m) for n, m in lora_layers(model)) if a.factors]
    check_finite([pair for a in adapted for pair in a.named])
    groups: dict[tuple, list[_Piece]] = defaultdict(list)
    for a in adapted:
        a.prepare()
        for p in a.pieces:
            groups[(p.tall, p.hat_y.shape[1:], p.y.device)].append(p)
    for pieces in groups.values():
        for factor in _ATTEMPTS:
            pieces = _attempt(pieces, factor)
            if not pieces:
                break
    return sum(p.segment.count for a in adapted for p in a.pieces)


def _attempt(pieces: list[_Piece], factor: float | None) -> list[_Piece]:
    """Treat the blocks that are above their caps once; gives the pieces that had some."""
    found = [p.problem() for p in pieces]
    batch = LowRankProblem.stack(found)
    far = torch.cat([p.short for p in pieces]) < 1.0
    above = ((batch.solve(torch.zeros_like(batch.ceiling))[0] > ACCEPT) | far).nonzero()[:, 0]
    if len(above) == 0:
        return []
    if factor is None:
        batch = batch[above]
        shift = batch.least_shift()
        g = batch.solve(shift)[1]
    touched, start = [], 0
    for p in pieces:
        mine = ((above >= start) & (above < start + p.segment.count)).nonzero()[:, 0]
        at, start = above[mine] - start, start + p.segment.count
        if len(at):
            touched.append(p)
            if factor is None:
                p.move(at, batch.hat[mine], shift[mine], g[mine])
            else:
                p.shorten(at, factor)
    return touched


def _spectra(name: str, layer: Any, weight: Tensor, fixed: list[str]) -> list[Spectrum]:
    """Spectra of the blocks of W0 (with its frozen adapters), from the cache if nothing was written since."""
    base = layer.base_layer
    sources = [base.weight, *(getattr(layer, f"lora_{x}")[a].weight for a in fixed for x in "AB")]
    scales = tuple(layer.scaling[a] for a in fixed)
    key = (base.layout, scales, *((t.data_ptr(), t._version, t.dtype, t.device) for t in sources))
    known = _CACHE.get(layer)
    if known is None or known[0] != key:
        known = (key, [_spectrum(name, s, w) for s, w in _capped(base.layout, weight)])
        _CACHE[layer] = known
    return known[1]


def _spectrum(name: str, segment: Segment, w: Tensor) -> Spectrum:
    d_out, d_in = w.shape[-2:]
    double = w.double()
    energy, basis = torch.linalg.eigh(double @ double.mT if d_out <= d_in else double.mT @ double)
    top = energy[:, -1].clamp_min(0.0).sqrt()
    assert segment.cap is not None
    limit = segment.cap * (d_out / d_in) ** 0.5
    worst = float(top.max()) / limit
    if worst > 1.0 + BASE_TOLERANCE:
        raise ConfigError(
            f"{name}: the base weight's {segment.role} block is {worst:.4g} times its cap {segment.cap:g}, "
            "so no adapter could be within it. Call project_(model) once, before training the adapters, or "
            "retrofit with a larger w_max."
        )
    ceiling = (top * (1.0 + _ROOM)).clamp_min(limit).square()
    return Spectrum(basis.to(torch.promote_types(w.dtype, torch.float32)), energy, ceiling)


def _capped(layout: Any, weight: Tensor) -> Iterator[tuple[Segment, Tensor]]:
    return ((s, v) for s, v in layout.views(weight) if s.cap is not None)


def _active(layer: Any) -> list[str]:
    return [a for a in layer.active_adapters if a in layer.lora_A]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every LoRA layer whose merged weight can be kept in the RMS->RMS norm.

    Raises UnsupportedModelError, by name and with the cure, for any other adapter.
    """
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Module):
            continue
        if not hasattr(module, "lora_A"):
            if isinstance(base, Constrained):
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise UnsupportedModelError(
                    f"{name} is wrapped by {kind}, which has no projection here. Use a plain LoraConfig."
                )
            continue
        _refuse(name, module, base)
        yield name, module


def _refuse(name: str, layer: Any, base: nn.Module) -> None:
    if len(getattr(layer, "lora_embedding_A", ())):
        raise UnsupportedModelError(
            f"{name}: LoRA on an embedding has no projection here, and its rows are capped. Leave the "
            "embedding out of target_modules."
        )
    if not isinstance(base, Constrained) or hasattr(layer, "parameter_name"):
        raise UnsupportedModelError(
            f"{name}: LoRA on {type(base).__name__}, which has no cap. Order: retrofit(model), then "
            "get_peft_model; target linear layers that the retrofit's report lists."
        )
    if entry_cap(base) is not None:
        raise UnsupportedModelError(
            f"{name}: its output is capped entrywise (gate_max), and an adapter adds behind the cap. Leave this layer "
            "out of target_modules, or retrofit with gate_max=None."
        )
    variant = bool(getattr(layer, "lora_variant", None)) or any(getattr(layer, "use_dora", {}).values())
    if variant or len(getattr(layer, "lora_magnitude_vector", ())) or hasattr(layer, "lora_E"):
        raise UnsupportedModelError(
            f"{name}: a variant of LoRA (DoRA, AdaLoRA or another) computes another weight than W0 + s B A, "
            "so it cannot be kept within its cap here. Use a plain LoraConfig (use_dora=False)."
        )


def _with_deltas(layer: Any, adapters: list[str], dtype: torch.dtype) -> Tensor:
    weight, transposed = layer.base_layer.weight.detach().to(dtype), layer.base_layer.layout.transposed
    for a in adapters:
        delta = layer.lora_B[a].weight.detach().to(dtype) @ layer.lora_A[a].weight.detach().to(dtype)
        weight = weight + (delta.T if transposed else delta) * layer.scaling[a]
    return weight


@torch.no_grad()
def merged_weight(layer: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weight that a LoRA layer computes with, in its base layer's storage orientation; a new tensor.

    W0 + sum of s B A over the active adapters; W0 as stored if they are merged already or disabled.
    """
    lora: Any = layer
    alone = lora.merged or lora.disable_adapters
    return _with_deltas(lora, [] if alone else _active(lora), dtype).clone()


def read_weight(module: nn.Module) -> Tensor | None:
    """For the certificate: the merged weight of a LoRA layer, None for any other module.

    Raises UnsupportedModelError for adapters whose function is not that of one weight.
    """
    layer: Any = module
    if not hasattr(layer, "lora_A"):
        return None
    _refuse("this layer", layer, layer.base_layer)
    if any(layer.lora_B[a].bias is not None for a in _active(layer)):
        raise UnsupportedModelError(
            "A LoRA with lora_bias=True adds to the bias, which is not certified yet."
        )
    return merged_weight(layer)


@torch.no_grad()
def merged_block_norms(model: nn.Module) -> list[BlockNorms]:
    """Proven upper RMS->RMS norms of the merged blocks over their caps, one entry for each LoRA layer."""
    root, _ = require_retrofit(model)
    norms = []
    for name, layer in lora_layers(root):
        blocks = list(_capped(layer.base_layer.layout, merged_weight(layer)))
        worst = max((float(rms_to_rms_upper(w).max()) / s.cap for s, w in blocks if s.cap), default=0.0)
        norms.append(BlockNorms(name, worst, sum(s.count for s, _ in blocks)))
    return norms


register_projector(project_adapters, merged_block_norms)
register_weight_reader(read_weight)
