"""What enters the first block of a model, as a function of the model's inputs.

For token ids it is a sum of one row from each embedding table. For images it is the embedded
patches plus positions. The graph runs the entry in the comparison with the model, and the radius is
about it.
"""

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
    """A table of rows [n, d] that the model looks up.

    Attributes:
        role: "token", "first", "position" or "type".
        name: full name of the embedding module or Parameter.
        module: what holds the rows as `weight`.
        offset: number of rows in front of the row of the first position.
        scale: what the model multiplies each row with.
    """

    role: str
    name: str
    module: Any
    offset: int = 0
    scale: float = 1.0

    def rows(self) -> Tensor:
        """The rows as they are stored now."""
        weight = self.module.weight
        return weight.reshape(-1, weight.shape[-1])

    def read(self) -> Tensor:
        """The rows times `scale`, in float64 if `scale` is not 1.

        The rows in front of `offset` are included, because the model may give them to padding.
        """
        rows = self.rows().detach()
        return rows if self.scale == 1.0 else rows.double() * self.scale


@dataclass
class Entry:
    """The map from a model's inputs to what its first block reads, [batch, tokens, d].

    Attributes:
        tables: the tables by role: "token", "first", "position", "type".
        token_map: linear map of the token rows, or None.
        patches: the patch convolution as a matrix [d, channels * p * p]. None for token models.
        patch: (height, width) of a patch.
        image: (channels, height, width) of an image.
        norm: the norm slot behind the sum, or None.
        padding: the token id that the model treats as padding by its value (see Architecture). None
            if it treats all ids alike. `run` is the model's embedding for sequences without this
            id.
        pixel_max: the certificate assumes that no pixel entry is larger than this in absolute
            value.
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
        """Width d of what enters the first block."""
        linear = self.patches or self.token_map
        return linear.d_out if linear else int(self.tables["token"].rows().shape[-1])

    @property
    def longest(self) -> int | None:
        """Largest number of tokens that the positions allow, or None without a position table."""
        table = self.tables.get("position")
        return None if table is None else int(table.rows().shape[0]) - table.offset

    def run(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """What enters the first block.

        Args:
            inputs: token ids [batch, tokens], or pixels [batch, channels, height, width].
            dtype: the dtype to compute in.

        Returns:
            A tensor [batch, tokens, d]. An image has one token for each patch, behind the row
            "first".
        """
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
        """The embedded patches of images, behind the row "first"."""
        assert self.patches is not None
        x = self.patches.run(self.cut(pixels.to(dtype)))
        first = self.tables["first"].rows().to(dtype).expand(x.shape[0], 1, -1)
        return torch.cat([first, x], dim=1)

    def cut(self, pixels: Tensor) -> Tensor:
        """Cut images into patches, row by row, each flattened as the convolution's weight is.

        Pixels [batch, channels, height, width] become patches [batch, n, channels * p * p].
        """
        p, q = self.patch
        blocks = pixels.unfold(2, p, p).unfold(3, q, q)  # batch, channels, rows, columns, p, q
        return blocks.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def sample(self, tokens: int, generator: torch.Generator, device: Any) -> Tensor:
        """Random inputs: two sequences of token ids, or two images.

        Sequences have at most `tokens` tokens, are no longer than the positions reach, and hold no
        padding. Pixel entries are at most `pixel_max` in absolute value.
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
        """Raise ConfigError if the token ids hold the padding id.

        The model treats that id in a way of its own, so it would not compute what the graph
        computes.
        """
        if (
            self.padding is None
            or self.patches is not None
            or not bool((ids == self.padding).any())
        ):
            return
        raise ConfigError(
            f"the token ids hold {self.padding}, the model's padding id (pad_token_id): its "
            "forward looks for that id, whatever the mask says, and would read another token for "
            "its prediction or count positions otherwise. Give batches of sequences of equal "
            "length, without padding."
        )


def entry_of(
    tables: list[tuple[str, str, Any]],
    scale: float,
    linear: Callable[[str], Linear],
    token_map: str | None,
    norm: Node | None,
    first_position: int | None = None,
) -> Entry:
    """Make the entry of a token model. For an image model, the caller adds the patches.

    Args:
        tables: (role, name, module) of each table.
        scale: what the forward multiplies the token rows with.
        linear: gives the node of a linear map by its name.
        token_map: name of the linear map of the token rows, or None.
        norm: the norm slot behind the sum, or None.
        first_position: the row where positions begin. None takes the `offset` that the table itself
            has (OPT's is 2), or 0.
    """
    found = {}
    for role, name, module in tables:
        offset = int(getattr(module, "offset", 0))
        if role == "position" and first_position is not None:
            offset = first_position
        found[role] = Table(role, name, module, offset, scale if role == "token" else 1.0)
    return Entry(found, token_map=linear(token_map) if token_map else None, norm=norm)
