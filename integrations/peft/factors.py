"""One LoRA layer as a projection sees it: its movable adapters, in coordinates of A's rows.

Let A [k, d_in] be the A of all movable adapters below each other, and B [d_out, k] their scaled B
beside each other, so that their whole change is B A. Then A = into Q^T with Q^T Q = 1, and the
change is E Q^T with E = B into. So E has the singular values of the change, in each block of rows.
It has only k columns, and every norm of a change is that of a k x k matrix.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from lip_plugin.integrations.peft.layers import (
    BUDGET,
    DORA,
    active,
    base_weight,
    kind_of,
    parameters_of,
    refuse_merged,
    with_deltas,
)
from lip_plugin.model.batches import refuse_sharded
from lip_plugin.model.layers import Constrained
from lip_plugin.model.layout import Layout, Segment

# More than k times float64's unit roundoff: what is lost when A is squared, as a share of the
# largest eigenvalue.
_GRAM = 1e-14
_RANK = 1e-13  # singular values of A below this share of the largest count as zero


class Factors:
    """The adapters of one layer that a projection may change.

    Everything is float64, except the adapters themselves.

    Attributes:
        movable: the active adapters with a trainable B, or all active ones if none is trainable.
        fixed: the other active ones. They count as part of W0.
        layout: the base's capped blocks, or None if the base has no caps.
        budget: the blocks of the change, with budgets in place of caps, or None if none was set.
        factors: (A, B, scaling) of each movable adapter whose scaling is not zero.
        named: (name, tensor) of everything that the active adapters train here.
    """

    def __init__(self, name: str, layer: Any) -> None:
        refuse_merged(name, layer)
        self.name, self.layer, self.kind = name, layer, kind_of(layer)
        self.layout: Layout | None = (
            layer.base_layer.layout if isinstance(layer.base_layer, Constrained) else None
        )
        self.budget: Layout | None = layer.__dict__.get(BUDGET)
        names = active(layer)
        self.movable = [a for a in names if layer.lora_B[a].weight.requires_grad] or names
        self.fixed = [a for a in names if a not in self.movable]
        self.named = [
            (f"{name}.{n}", t) for a in names for n, t in parameters_of(layer, a, str(self.kind))
        ]
        for _, tensor in [*self.named, (name, layer.base_layer.weight)]:
            refuse_sharded(tensor)
        pairs = {a: (layer.lora_A[a].weight, layer.lora_B[a].weight) for a in self.movable}
        self.factors = [(*pairs[a], layer.scaling[a]) for a in self.movable if layer.scaling[a]]

    @property
    def magnitude(self) -> Tensor | None:
        """DoRA's m [d_out], or None if this is a LoRA."""
        return (
            self.layer.lora_magnitude_vector[self.movable[0]].weight if self.kind == DORA else None
        )

    def rows(self) -> Tensor:
        """The A of all movable adapters below each other, [k, d_in]."""
        return torch.cat([a.detach().double() for a, _, _ in self.factors])

    def coordinates(self) -> None:
        """Compute `into` [k, k] and its inverse `back`, from the k x k Gram matrix of A's rows."""
        a = self.rows()
        squares, v = torch.linalg.eigh(a @ a.T)
        # The squares are raised by more than eigh can be wrong. So sizes are bounds from above, and
        # `into` has an inverse.
        s = (squares.clamp_min(0.0) + _GRAM * squares[-1].clamp_min(1e-200)).sqrt()
        self.into = v * s
        self.back = (v / s).T

    def full_coordinates(self) -> Tensor:
        """Compute `into` and `back` to full precision, from A itself.

        Returns:
            The orthonormal basis Q [d_in, k].
        """
        q, r = torch.linalg.qr(self.rows().T)
        u, s, vh = torch.linalg.svd(r, full_matrices=False)
        kept = s > _RANK * s.max()
        self.into = vh.T * (s * kept)
        self.back = torch.where(kept, 1.0 / s, 0.0)[:, None] * vh
        return (q @ u) * kept

    def b(self, rows: slice) -> Tensor:
        """The scaled B of all movable adapters beside each other, [rows, k]."""
        return torch.cat([b.detach()[rows].double() * s for _, b, s in self.factors], dim=1)

    def blocks(self, segment: Segment) -> Tensor:
        """E of a segment's blocks, [count, d_out, k]. It has the change's singular values."""
        rows = self.b(slice(segment.start, segment.stop)) @ self.into
        return rows.unflatten(0, (segment.count, segment.d_out))

    def write(self, rows: Any, new: Tensor) -> None:
        """Write rows of the scaled B back into the adapters."""
        parts = new.split([b.shape[1] for _, b, _ in self.factors], dim=1)
        for (_, b, s), part in zip(self.factors, parts, strict=True):
            b[rows] = (part / s).to(b.dtype)

    def write_blocks(self, segment: Segment, at: Tensor, new: Tensor) -> None:
        """Write blocks `at` of a segment back into the adapters; `new` is [len(at), d_out, k]."""
        first = segment.start + at * segment.d_out
        rows = first[:, None] + torch.arange(segment.d_out, device=at.device)
        self.write(rows.flatten(), new.flatten(0, 1))

    def weight(self) -> Tensor:
        """W0 with the frozen adapters, in storage orientation, in its own dtype or float32."""
        weight = base_weight(self.layer)
        if self.fixed:
            return with_deltas(
                self.layer, self.fixed, torch.promote_types(weight.dtype, torch.float32)
            )
        return weight

    def sources(self) -> tuple:
        """What `weight` depends on, as a value that can be compared."""
        base = self.layer.base_layer
        tensors = [
            base.weight,
            *(t for a in self.fixed for _, t in parameters_of(self.layer, a, "lora")),
        ]
        scales = tuple(self.layer.scaling[a] for a in self.fixed)
        return (
            self.layout,
            scales,
            *((t.data_ptr(), t._version, t.dtype, t.device) for t in tensors),
        )


def change_sizes(found: list[tuple[Factors, Segment]]) -> list[Tensor]:
    """sigma_max of the change for the blocks of each segment, from k x k matrices, rounded up.

    Args:
        found: layers with their segments. `coordinates` must have been called on each layer.

    Returns:
        A float64 tensor [count] for each segment.
    """
    grams = []
    for factors, segment in found:
        e = factors.blocks(segment)
        grams.append(e.mT @ e)
    sizes: list[Tensor] = [torch.empty(0)] * len(grams)
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, gram in enumerate(grams):
        groups[(gram.shape[-1], gram.device)].append(i)
    for members in groups.values():  # one call for all of one rank, because calls are slow
        tops = (
            torch.linalg.eigvalsh(torch.cat([grams[i] for i in members]))[:, -1]
            .clamp_min(0.0)
            .sqrt()
        )
        parts = tops.split([len(grams[i]) for i in members])
        for i, part in zip(members, parts, strict=True):
            sizes[i] = part
    return sizes
