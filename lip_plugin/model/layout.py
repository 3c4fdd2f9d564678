"""Blocks: which parts of a weight are capped on their own, and how to see them as batches.

A weight is read as a matrix [d_out, d_in] (a Conv1D's transposed, a patch convolution's flattened to
[d, channels * p * p]). Its rows are cut into segments;
a segment is `count` equal blocks below each other, so it is a view [count, d_out / count, d_in] of
the weight, without a copy. One head of q is a block; so is a whole feed-forward matrix.

Layouts are made of strings and numbers only: an optimizer keeps them in its param_groups, where
they outlive FSDP's swap of the tensors and go through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

RMS_TO_RMS = "rms_to_rms"  # cap on sigma_max * sqrt(d_in / d_out) of each block
ROW = "row"  # cap on the RMS norm of each row (embedding tables)


@dataclass(frozen=True)
class Segment:
    """`count` blocks of `d_out` rows each, from row `start` on; `cap` None means measured only."""

    role: str
    start: int
    count: int
    d_out: int
    cap: float | None

    @property
    def stop(self) -> int:
        return self.start + self.count * self.d_out


@dataclass(frozen=True)
class Layout:
    """How one weight falls into blocks.

    Attributes:
        norm: `"rms_to_rms"` or `"row"`, the norm that the caps are stated in.
        transposed: the weight is stored [d_in, d_out] (transformers' Conv1D).
        segments: in order, covering every row once.
    """

    norm: str
    transposed: bool
    segments: tuple[Segment, ...]

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [d_out, d_in], a view; of a table with leading axes of size 1, its rows.

        Raises RuntimeError (torch's) where no view exists: a copy would lose what is written to it.
        """
        if weight.dim() > 2:
            return (
                weight.view(-1, weight.shape[-1])
                if self.norm == ROW
                else weight.view(weight.shape[0], -1)
            )
        return weight.t() if self.transposed else weight

    def views(self, weight: Tensor) -> Iterator[tuple[Segment, Tensor]]:
        """Yield (segment, view [count, d_out, d_in]) in order; writing to a view writes the weight."""
        matrix = self.matrix(weight)
        if (
            self.norm == ROW
        ):  # a table may be cropped to fewer rows after the retrofit (nanoGPT does)
            yield self.segments[0], matrix.unsqueeze(0)
            return
        for segment in self.segments:
            rows = matrix[segment.start : segment.stop]
            yield segment, rows.unflatten(0, (segment.count, segment.d_out))

    def to_plain(self) -> tuple:
        """Nested tuples of strings and numbers."""
        return (self.norm, self.transposed, tuple(astuple(s) for s in self.segments))

    @classmethod
    def from_plain(cls, plain: tuple) -> Layout:
        """Inverse of `to_plain` (lists are taken as well)."""
        norm, transposed, segments = plain
        return cls(norm, bool(transposed), tuple(Segment(*s) for s in segments))

    def covers(self, weight: Tensor) -> bool:
        """Whether the segments tile the rows of `weight` exactly."""
        if weight.dim() < 2:  # flattened
            return False
        rows = weight.shape[1 if self.transposed else 0]  # by shapes alone: it may be sharded
        edges = [0, *(s.stop for s in self.segments)]
        return all(s.start == e for s, e in zip(self.segments, edges)) and edges[-1] == rows


def one_block(
    role: str, d_out: int, cap: float | None, *, norm: str = RMS_TO_RMS, transposed: bool = False
) -> Layout:
    """Layout of a weight that is one block."""
    return Layout(norm, transposed, (Segment(role, 0, 1, d_out, cap),))


@torch.no_grad()
def clamp_rows_(rows: Tensor, cap: float) -> None:
    """Scale down, in place, every row of [..., n, d] whose RMS norm exceeds `cap`.

    The quotient is formed in float64 and the stored row re-checked, because rounding to a short
    dtype can lift a row above the cap again.
    """
    margin = 1.0 - 4 * torch.finfo(rows.dtype).eps
    for _ in range(2):
        norms = rows.double().square().mean(-1, keepdim=True).sqrt()
        over = norms > cap
        scale = torch.where(over, cap * margin / norms.clamp_min(1e-300), torch.ones_like(norms))
        rows.copy_(torch.where(over, (rows.double() * scale).to(rows.dtype), rows))
