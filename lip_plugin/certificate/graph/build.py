"""`build(model)`: the graph of a model, which copies its structure and shares its weights.

The family's `Architecture` says which module has which role. This file makes a node, or several,
for each of them. Everything in a model that no rule covers is refused here by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.certificate.graph.base import Node
from lip_plugin.certificate.graph.branches import (
    activation_of,
    attention_branch,
    config_of_root,
    mlp_branch,
    slot_of,
)
from lip_plugin.certificate.graph.containers import Chain, Parallel, Residual
from lip_plugin.certificate.graph.entry import Entry, entry_of
from lip_plugin.certificate.graph.joint_bounds import MlpResidual
from lip_plugin.certificate.graph.nodes import (
    Activation,
    Linear,
    OneToken,
    Scale,
    Softcap,
)
from lip_plugin.certificate.graph.weights import (
    linear_of,
    maps_of,
    read_linear,
    refuse_computed,
)
from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.activations import FunctionActivation
from lip_plugin.model.architecture import Architecture, Family, find_family
from lip_plugin.model.layers import RowParameter, is_embedding, table_of
from lip_plugin.model.parts import (
    LayerParts,
    Parts,
    parts,
    refuse_undescribed,
)
from lip_plugin.model.wrappers import unwrap
from lip_plugin.surgery.state import find_retrofit, is_retrofitted


@dataclass
class Graph:
    """A model as nodes. `entry` leads from its inputs to the first block, `body` on to the logits.

    Attributes:
        subject: what the user passed, or the outermost part of it that one process may run (see
            lip_plugin/model/wrappers.py). The comparison runs this.
        root: the model of a known family inside `subject`.
        family: the family of `root`.
        parts: the full names of the modules of `root`, by their roles.
        entry: the map from the inputs to what enters the first block.
        blocks: the nodes of each layer.
        readout: the nodes behind the last layer.
        only: if it is given, `linears` lists only the linear modules of these names. This lets a
            caller measure one layer at a time.
    """

    subject: nn.Module
    root: nn.Module
    family: Family
    parts: Parts
    entry: Entry
    blocks: tuple[tuple[Node, ...], ...]
    readout: tuple[Node, ...]
    only: frozenset[str] | None = None

    @cached_property
    def body(self) -> Chain:
        """All nodes from the first block to the logits, one after another."""
        return Chain("model", [*chain.from_iterable(self.blocks), *self.readout])

    @property
    def patches(self) -> Linear | None:
        """The patch convolution as a matrix with d_in = channels * p * p. None for token models.

        If an image changes by eps in 2-norm, then what enters the first block changes by at most
        sigma_max(matrix) * eps in 2-norm over all tokens together, because patches do not overlap.
        So the change of each single token is at most that, too.
        """
        return self.entry.patches

    def embed(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """What enters the first block, [batch, tokens, d], computed in `dtype`.

        The inputs are token ids [batch, tokens], or pixels [batch, channels, height, width].
        """
        return self.entry.run(inputs, dtype)

    def tables(self) -> list[str]:
        """Names of the embedding tables whose rows add up to the input of the first block."""
        return [table.name for table in self.entry.tables.values()]

    def linears(self) -> list[tuple[str, str, nn.Module, Tensor]]:
        """Every linear map as (role, name of its node, plain base module, effective weight).

        The weight is stored as the module's own is, so it is [d_in, d_out] for a Conv1D. There are
        three exceptions. A convolution's weight is given as a matrix. The rows of a fused q, k and
        v are given in that order. A fused gate and up are two maps.
        """
        found = []
        for role, name in self.parts.linears():
            if self.only is not None and name not in self.only:
                continue
            base = read_linear(self.root.get_submodule(name), name)[0]
            interleaved = (
                self.parts.n_heads if self.parts.architecture.attention.interleaved else None
            )
            for part, node, weight, _ in maps_of(self.root, role, name, interleaved):
                found.append((part, node, base, weight()))
        return found


def build(model: nn.Module) -> Graph:
    """Make the graph of a model of a known family, retrofitted or not.

    Wrappers that are known are looked through.

    Args:
        model: the object that a certificate is asked for.

    Raises:
        UnsupportedModelError: a module has no proven rule, or a wrapper is not known. It is named.
    """
    subject, root = unwrap(model, is_retrofitted)
    family = find_family(root)
    names = parts(root, family.architecture)
    refuse_undescribed(root, names)
    blocks = tuple(tuple(_block(root, names, layer)) for layer in names.layers)
    return Graph(
        subject, root, family, names, _entry(root, names), blocks, tuple(_readout(root, names))
    )


def _block(root: nn.Module, names: Parts, layer: LayerParts) -> Iterator[Node]:
    """The nodes of one layer.

    They are its two branches, one after the other, each with the norm behind its sum if there is
    one. In a family with parallel branches they are one node for both.
    """
    chains = [attention_branch(root, names, layer), mlp_branch(root, names, layer)]
    if names.architecture.parallel:
        yield Parallel(layer.name, chains)
        return
    for branch, branch_chain, kind in zip(
        layer.branches, chains, (Residual, MlpResidual), strict=True
    ):
        yield kind(branch.module, branch_chain)
        if branch.sum_norm:
            yield slot_of(root, branch.sum_norm)


_ONE_TOKEN = {"first": 0, "last": -1}  # index of the token that a classifier keeps


def _readout(root: nn.Module, names: Parts) -> list[Node]:
    """The nodes from the last block to the logits."""
    architecture, config = names.architecture, config_of_root(root)
    nodes: list[Node] = []
    if architecture.final_norm:
        nodes.append(slot_of(root, architecture.final_norm))
    for kind, path in architecture.readout:
        if kind in _ONE_TOKEN:
            padding = _padding(root, architecture) if kind == "last" else None
            nodes.append(OneToken(f"{kind} token", _ONE_TOKEN[kind], padding))
        elif kind == "function":
            name = f"{path} in front of {architecture.head}"
            nodes.append(Activation(name, FunctionActivation(path), path))
        elif kind == "dense":
            nodes.append(linear_of(root, "dense", path))
        elif kind == "act":
            nodes += activation_of(root, path)
        else:
            nodes.append(slot_of(root, path))
    nodes.append(linear_of(root, "head", architecture.head))
    divisor = (
        float(getattr(config, architecture.logits_divisor)) if architecture.logits_divisor else 1.0
    )
    if divisor != 1.0:
        nodes.append(Scale(f"1 / {architecture.logits_divisor}", 1.0 / divisor))
    cap = getattr(config, architecture.softcap, None) if architecture.softcap else None
    if cap is not None:
        nodes.append(Softcap(str(architecture.softcap), float(cap)))
    return nodes


def _padding(root: nn.Module, architecture: Architecture) -> int | None:
    """The token id that the forward treats as padding by its value, or None."""
    return attrgetter(architecture.padding)(root) if architecture.padding else None


def _embedding_scale(root: nn.Module, architecture: Architecture) -> float:
    """What the forward multiplies the token rows with. It is 1 if there is no multiplier.

    A multiplier that is a buffer is rounded to the table's dtype, as the forward does. On the meta
    device a buffer has no value. Then the float that it is filled from on loading is taken.

    Raises:
        UnsupportedModelError: There is a multiplier, and its value is not known.
    """
    if not architecture.embedding_scale:
        return 1.0
    for path in architecture.embedding_scale:
        owner, _, attribute = path.rpartition(".")
        value = getattr(root.get_submodule(owner), attribute)
        if isinstance(value, Tensor) and not value.is_meta:
            return float(value.to(table_of(root, str(architecture.tokens)).weight.dtype))
        if not isinstance(value, Tensor) and len(architecture.embedding_scale) == 1:
            return float(value)
        if not isinstance(value, Tensor):
            dtype = table_of(root, str(architecture.tokens)).weight.dtype
            return float(torch.tensor(value, dtype=torch.float32).to(dtype))
    raise UnsupportedModelError(
        f"{architecture.embedding_scale[0]} multiplies the rows of the token table, and it has no "
        "value on the meta device. Load the model on a real device."
    )


# The map from the model's inputs to what enters the first block.
def _entry(root: nn.Module, names: Parts) -> Entry:
    architecture, config = names.architecture, config_of_root(root)
    scale = _embedding_scale(root, architecture)
    tables = [(role, name, _known_table(root, name)) for role, name in names.tables()]
    norm = slot_of(root, architecture.entry_norm) if architecture.entry_norm else None
    padding = _padding(root, architecture)
    first_position = (
        padding + 1 if architecture.positions_follow_padding and padding is not None else None
    )
    entry = entry_of(
        tables,
        scale,
        lambda name: linear_of(root, "token_map", name),
        architecture.token_map,
        norm,
        first_position,
    )
    entry.padding = padding
    if architecture.patches:
        conv: Any = root.get_submodule(architecture.patches)
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        entry.patches = linear_of(root, "patch", architecture.patches)
        entry.patch, entry.image = conv.kernel_size, (conv.in_channels, height, width)
        found = find_retrofit(root)
        entry.pixel_max = found[1].config.pixel_max if found is not None else 1.0
    return entry


def _known_table(root: nn.Module, name: str) -> Any:
    """A table of rows, if it is looked up as an embedding is.

    Raises UnsupportedModelError if an adapter or another wrapper stands in its place.
    """
    table = table_of(root, name)
    if isinstance(table, RowParameter):
        return table
    if is_embedding(table):
        refuse_computed(table, name)
        if table.max_norm is not None:
            raise UnsupportedModelError(
                f"{name} renormalizes itself at lookup (max_norm); set max_norm=None."
            )
        return table
    raise UnsupportedModelError(
        f"{name} is {type(table).__module__}.{type(table).__name__}: what it looks up has no "
        "proven rule here. Merge adapters (merge_and_unload), or leave the embedding out of their "
        "target_modules."
    )
