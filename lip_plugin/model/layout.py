"""Blocks: which parts of a weight are capped on their own, and how to see them as batches.

A weight is read as a matrix [d_out, d_in]. (A Conv1D stores it transposed. A patch convolution is
flattened to [d, channels * p * p].) Its rows are cut into segments. A segment consists of `count`
equal blocks below each other, so it is a view [count, rows of a block, d_in] of the weight, without
a copy. One head of q is a block, and so is a whole feed-forward matrix.

Layouts consist of strings and numbers only. An optimizer keeps them in its param_groups. There they
outlive FSDP's swap of the tensors, and they go through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

RMS_TO_RMS = "rms_to_rms"  # caps are on sigma_max * sqrt(d_in / d_out) of each block
ROW = "row"  # caps are on the RMS norm of each row, for embedding tables


@dataclass(frozen=True)
class Segment:
    """`count` blocks below each other, from row `start` on.

    Attributes:
        role: What the rows are, such as "q" or "down".
        start: The first row.
        count: The number of blocks.
        d_out: The rows of each block.
        cap: The cap of each block, in the norm of the layout. None means that it is only measured.
    """

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
    """How one weight is cut into blocks.

    Attributes:
        norm: `"rms_to_rms"` or `"row"`, the norm in which the caps are stated.
        transposed: Whether the weight is stored [d_in, d_out], as by transformers' Conv1D.
        segments: In order. Together they cover every row once.
    """

    norm: str
    transposed: bool
    segments: tuple[Segment, ...]

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a view [d_out, d_in].

        For a table with leading axes of size 1 these are its rows.

        Raises:
            RuntimeError: torch's own, where no view exists. A copy would lose what is written to
                it.
        """
        if weight.dim() > 2:
            return (
                weight.view(-1, weight.shape[-1])
                if self.norm == ROW
                else weight.view(weight.shape[0], -1)
            )
        return weight.t() if self.transposed else weight

    def views(self, weight: Tensor) -> Iterator[tuple[Segment, Tensor]]:
        """Yield (segment, view [count, d_out, d_in]) in order.

        Writing to a view writes to the weight.
        """
        matrix = self.matrix(weight)
        # A table may have fewer rows than at the retrofit (nanoGPT crops it), so it is taken whole.
        if self.norm == ROW:
            yield self.segments[0], matrix.unsqueeze(0)
            return
        for segment in self.segments:
            rows = matrix[segment.start : segment.stop]
            yield segment, rows.unflatten(0, (segment.count, segment.d_out))

    def to_plain(self) -> tuple:
        """The layout as nested tuples of strings and numbers."""
        return (self.norm, self.transposed, tuple(astuple(s) for s in self.segments))

    @classmethod
    def from_plain(cls, plain: tuple) -> Layout:
        """The inverse of `to_plain`. Lists are taken as well as tuples."""
        norm, transposed, segments = plain
        return cls(norm, bool(transposed), tuple(Segment(*s) for s in segments))

    def covers(self, weight: Tensor) -> bool:
        """Whether the segments cover the rows of `weight` exactly."""
        if weight.dim() < 2:  # it was flattened
            return False
        rows = weight.shape[1 if self.transposed else 0]  # only shapes: the weight may be sharded
        edges = [0, *(s.stop for s in self.segments)]
        return all(s.start == e for s, e in zip(self.segments, edges)) and edges[-1] == rows


def one_block(
    role: str, d_out: int, cap: float | None, *, norm: str = RMS_TO_RMS, transposed: bool = False
) -> Layout:
    """The layout of a weight that is one block.

    Args:
        role: What the rows are.
        d_out: The number of rows.
        cap: In `norm`, or None.
        norm: RMS_TO_RMS or ROW.
        transposed: Whether the weight is stored [d_in, d_out].
    """
    return Layout(norm, transposed, (Segment(role, 0, 1, d_out, cap),))


@torch.no_grad()
def clamp_rows_(rows: Tensor, cap: float) -> None:
    """Scale down, in place, every row whose RMS norm exceeds `cap`.

    The quotient is formed in float64. The stored row is checked once more, because rounding to a
    short dtype can lift it above the cap again.

    Args:
        rows: [..., n, d].
        cap: The largest RMS norm of a row.
    """
    margin = 1.0 - 4 * torch.finfo(rows.dtype).eps
    for _ in range(2):
        norms = rows.double().square().mean(-1, keepdim=True).sqrt()
        over = norms > cap
        scale = torch.where(over, cap * margin / norms.clamp_min(1e-300), torch.ones_like(norms))
        rows.copy_(torch.where(over, (rows.double() * scale).to(rows.dtype), rows))
