"""What enters the first block: sums of one row per table, or patches of an image with positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.graph.base import Node
from lip_plugin.certificate.graph.nodes import Linear
from lip_plugin.errors import ConfigError


@dataclass
class Table:
    """Rows [n, d] that are looked up: from row `offset` on, each times `scale`."""

    role: str
    name: str
    module: Any
    offset: int = 0
    scale: float = 1.0

    def rows(self) -> Tensor:
        """The rows as stored, read when needed."""
        weight = self.module.weight
        return weight.reshape(-1, weight.shape[-1])

    def read(self) -> Tensor:
        """The rows times `scale`, in float64 if that is not 1 (those before `offset` too: padding may be given them)."""
        rows = self.rows().detach()
        return rows if self.scale == 1.0 else rows.double() * self.scale


@dataclass
class Entry:
    """Inputs of the model -> what its first block reads [batch, tokens, d].

    Attributes:
        tables: by role: token, first, position, type.
        token_map: linear map of the token rows.
        patches: the patch convolution as a matrix [d, channels * p * p], of image models.
        patch: (height, width) of a patch.
        image: (channels, height, width) of an image.
        norm: slot behind the sum.
        padding: token id that the model treats as padding by its value (see Architecture); None if all ids
            are treated alike. `run` is the model's embedding for sequences without it.
        pixel_max: bound on the absolute value of every pixel entry that the certificate assumes.
    """

    tables: dict[str, Table]
    token_map: Linear | None = None
    patches: Linear | None = None
    patch: tuple[int, int] = (1, 1)
    image: tuple[int, int, int] = (0, 0, 0)
    norm: Node | None = None
    padding: int | None = None
    pixel_max: float = 1.0

    @property
    def width(self) -> int:
        """d of what enters the first block."""
        linear = self.patches or self.token_map
        return linear.d_out if linear else int(self.tables["token"].rows().shape[-1])

    @property
    def longest(self) -> int | None:
        """Largest number of tokens that the positions allow; None if there is no table of them."""
        table = self.tables.get("position")
        return None if table is None else int(table.rows().shape[0]) - table.offset

    def run(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Of token ids [batch, tokens], or of pixels [batch, channels, height, width]."""
        x = self._pixels(inputs, dtype) if self.patches else self._tokens(inputs, dtype)
        if "position" in self.tables:
            table = self.tables["position"]
            x = x + table.rows()[table.offset : table.offset + x.shape[1]].to(dtype)
        if "type" in self.tables:
            x = x + self.tables["type"].rows()[0].to(dtype)
        return x if self.norm is None else self.norm.run(x)

    def _tokens(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        table = self.tables["token"]
        x = table.rows()[ids].to(dtype) * table.scale
        return x if self.token_map is None else self.token_map.run(x)

    def _pixels(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Each patch, flattened as its weight is, through the matrix; behind the first row."""
        assert self.patches is not None
        x = self.patches.run(self.cut(pixels.to(dtype)))
        first = self.tables["first"].rows().to(dtype).expand(x.shape[0], 1, -1)
        return torch.cat([first, x], dim=1)

    def cut(self, pixels: Tensor) -> Tensor:
        """Pixels [batch, channels, height, width] -> patches [batch, n, channels * p * p], row by row."""
        p, q = self.patch
        blocks = pixels.unfold(2, p, p).unfold(3, q, q)  # batch, channels, rows, columns, p, q
        return blocks.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def sample(self, tokens: int, generator: torch.Generator, device: Any) -> Tensor:
        """Random inputs of two sequences, or two images, with entries that the assumptions allow.

        Sequences are no longer than the positions reach, and hold no padding.
        """
        if self.patches:
            values = torch.rand((2, *self.image), generator=generator, dtype=torch.float64)
            return ((2 * values - 1) * self.pixel_max).to(device)
        rows, tokens = self.tables["token"].rows().shape[0], min(tokens, self.longest or tokens)
        if self.padding is None or not 0 <= self.padding < rows:
            return torch.randint(0, rows, (2, tokens), generator=generator).to(device)
        ids = torch.randint(0, rows - 1, (2, tokens), generator=generator)
        return (ids + (ids >= self.padding)).to(device)

    def refuse_padding(self, ids: Tensor) -> None:
        """Raise ConfigError for token ids with padding in them: the model would not do with them what the graph does."""
        if (
            self.padding is None
            or self.patches is not None
            or not bool((ids == self.padding).any())
        ):
            return
        raise ConfigError(
            f"the token ids hold {self.padding}, the model's padding id (pad_token_id): its forward looks for that id, whatever "
            "the mask says, and would read another token for its prediction or count positions otherwise. Give batches of "
            "sequences of equal length, without padding."
        )


def entry_of(
    tables: list[tuple[str, str, Any]],
    scale: float,
    linear: Callable[[str], Linear],
    token_map: str | None,
    norm: Node | None,
    first_position: int | None = None,
) -> Entry:
    """Entry of token models from (role, name, module) of its tables.

    Positions begin at row `first_position`; None takes the `offset` that the table itself has (OPT's is 2), or 0.
    """
    found = {}
    for role, name, module in tables:
        offset = int(getattr(module, "offset", 0))
        if role == "position" and first_position is not None:
            offset = first_position
        found[role] = Table(role, name, module, offset, scale if role == "token" else 1.0)
    return Entry(found, token_map=linear(token_map) if token_map else None, norm=norm)
