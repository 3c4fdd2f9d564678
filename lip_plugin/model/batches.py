"""Equal-shaped blocks of many weights as one batch, and back.

A GPT-2-small has 480 blocks in four shapes. A constraint step is cheap because there is one batched
matrix product for each shape. Batches end at `MAX_ELEMENTS`, so that the temporaries of a
projection stay small next to the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lip_plugin.errors import UnsupportedModelError
from lip_plugin.linalg.norms import sigma_max_upper
from lip_plugin.model.layout import Layout

MAX_ELEMENTS = 1 << 22  # 16 MiB of float32 in each temporary


@dataclass
class Batch:
    """Views of blocks of several tensors that share shape, dtype, device and cap.

    Attributes:
        cap: The cap of every block. None means that they are only measured.
        views: Views [count, d_out, d_in]. views[i] is segment number positions[i] of the caller's
            tensor number owners[i].
        owners: For each view, the number of its tensor.
        positions: For each view, the number of its segment.
    """

    cap: float | None
    views: list[Tensor] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def gather(self) -> Tensor:
        """All blocks as one new tensor [n, d_out, d_in]."""
        return torch.cat(self.views) if len(self.views) > 1 else self.views[0].clone()

    def sigma_max_upper(self) -> list[float]:
        """Proven upper bounds of sigma_max of all blocks, in the order of `gather`.

        Inside `measured_once` a block that was measured before is not measured again.
        """
        known = _measured.get()
        if known is None:
            return sigma_max_upper(self.gather()).tolist()
        keys = [_key(view) for view in self.views]
        if not all(key in known for key in keys):
            # All of them, so that a certificate is the same to the last digit as without.
            values = sigma_max_upper(self.gather()).tolist()
            for key, view in zip(keys, self.views, strict=True):
                known[key] = view, [values.pop(0) for _ in range(len(view))]
        return [value for key in keys for value in known[key][1]]

    def scatter_(self, blocks: Tensor) -> None:
        """Write blocks [n, d_out, d_in] back into the tensors that the views belong to."""
        start = 0
        for view in self.views:
            view.copy_(blocks[start : start + view.shape[0]])
            start += view.shape[0]

    def at(self, tensors: list[Tensor], layouts: list[Layout]) -> list[Tensor]:
        """The blocks at the same places in other tensors: gradients or momenta of the weights."""
        return [
            list(layouts[owner].views(tensors[owner]))[position][1]
            for owner, position in zip(self.owners, self.positions)
        ]


# By the place of a view in memory: the view, and the norms of its blocks. The view is kept, so that
# no other tensor can take its place.
_Known = dict[tuple[object, ...], tuple[Tensor, list[float]]]
_measured: ContextVar[_Known | None] = ContextVar("measured", default=None)


def _key(view: Tensor) -> tuple[object, ...]:
    place = (view.data_ptr(), view.device, view.dtype, tuple(view.shape), view.stride())
    # A change in place raises the version, but for one through `.data`; nothing that could make one
    # runs between the measurements of an entry. Tensors of inference mode have no version.
    return (*place, 0 if view.is_inference() else view._version)


@contextmanager
def measured_once() -> Iterator[None]:
    """Inside, each block is measured once, whoever asks for its norm.

    A certificate and `block_norms` need the same norms, and each costs a factorization. Nothing may
    write to a weight through `.data` inside, because that is not seen.
    """
    token = _measured.set({})
    try:
        yield
    finally:
        _measured.reset(token)


def gathered_lerp(starts: list[Tensor], ends: list[Tensor], weight: float) -> Tensor:
    """start + weight (end - start), as one new tensor.

    Args:
        starts, ends: Lists of tensors [count, d_out, d_in] of equal shapes.
        weight: How far to go from start to end.
    """
    if len(starts) == 1:
        return torch.lerp(starts[0], ends[0], weight)
    return torch.cat([torch.lerp(start, end, weight) for start, end in zip(starts, ends)])


def batches(tensors: Iterable[Tensor], layouts: Iterable[Layout]) -> Iterator[Batch]:
    """Group the blocks of `tensors` by shape, dtype, device and cap.

    Args:
        tensors: Weights that are whole on this process.
        layouts: The layout of each.

    Raises:
        UnsupportedModelError: A tensor is sharded or flattened.
    """
    open_batches: dict[tuple, Batch] = {}
    sizes: dict[tuple, int] = {}
    for owner, (tensor, layout) in enumerate(zip(tensors, layouts)):
        refuse_sharded(tensor)
        refuse_flattened(tensor)
        for position, (segment, view) in enumerate(layout.views(tensor)):
            key = (*view.shape[1:], view.dtype, view.device, segment.cap)
            if key in open_batches and sizes[key] + view.numel() > MAX_ELEMENTS:
                yield open_batches.pop(key)
            batch = open_batches.setdefault(key, Batch(segment.cap))
            sizes[key] = view.numel() + (sizes[key] if batch.views else 0)
            batch.views.append(view)
            batch.owners.append(owner)
            batch.positions.append(position)
    yield from open_batches.values()


def cost_of(weight: Tensor, layout: Layout) -> float:
    """The cost of a step on this weight's blocks, in operations up to a factor.

    Owners of weights are chosen by it (`lip_plugin.distributed.owners`).
    """
    rows = sum(s.count * s.d_out for s in layout.segments)
    d_in = weight.numel() / max(1, rows)
    return sum(s.count * s.d_out * d_in * min(s.d_out, d_in) for s in layout.segments)


def refuse_sharded(tensor: Tensor) -> None:
    """Raise for a DTensor. A shard of a matrix has another norm than the matrix."""
    if hasattr(tensor, "full_tensor"):
        raise UnsupportedModelError(
            "This parameter is sharded (DTensor), and the norm of a shard is not the norm of its "
            "matrix. Of sharded models LipschitzMuon, attach_projection, project_, certify, "
            "falsify and plan_caps work; for anything else take "
            "lip_plugin.distributed.gather.gathered(model), a plain copy on the first process."
        )


def refuse_flattened(weight: Tensor) -> None:
    """Raise for a matrix without two axes.

    FSDP1 makes such ones: it joins weights and cuts them anywhere.
    """
    if weight.dim() < 2:
        raise UnsupportedModelError(
            f"This weight has shape {tuple(weight.shape)}: it was flattened (FSDP1), and a piece "
            "of a matrix has no norm. Use FSDP2 (fully_shard; fsdp_version: 2 in accelerate), or "
            "DDP."
        )
