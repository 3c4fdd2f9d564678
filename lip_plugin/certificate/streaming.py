"""`certify_layers`: a certificate that needs the memory of one layer only.

The model is a skeleton on the meta device, which has shapes and no values. Its weights are read,
measured, and let go again. Biases and gains are read once and stay, since they are small. Matrices
come and go one layer at a time. The embedding tables are read together, because the radius is about
sums of their rows.

Norms, rules and fingerprint are those of `certify`, so the numbers are the same. There is one
exception. Where `certify` measures a block in one batch with others that are read apart from it
here, the two numbers may differ by rounding, about 1e-8, if the block has more than 128 rows and
columns. Both numbers are proven.

The float64 comparison with the model's own forward needs weights. So it is made on a twin, which is
a small model of the same config with fewer layers. The twin must have a layer of every kind that
the skeleton has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.certificate.certify import SOURCES, bound_of
from lip_plugin.certificate.comparison.compare import check_graph
from lip_plugin.certificate.fingerprint import Fingerprint, capped_weights, stored_tensors
from lip_plugin.certificate.function_facts import buffers_of
from lip_plugin.certificate.graph.base import ProvenNorms
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.input_radius import radius_of
from lip_plugin.certificate.result import Certificate, check_within_caps
from lip_plugin.certificate.weight_norms import cap_norms, weight_norms
from lip_plugin.errors import CertificateError, ConfigError, NonFiniteError
from lip_plugin.surgery.block_norms import block_norms

_ROWS = 4096  # rows of a tensor that are checked for nan and inf at a time
# Goes through a list of groups of tensor names and may show how far it is, as tqdm does.
Progress = Callable[[list[list[str]]], Iterable[list[str]]]


@torch.no_grad()
def certify_layers(
    skeleton: nn.Module,
    twin: nn.Module,
    read: Callable[[str], Tensor],
    source: str = "weights",
    progress: Progress = iter,
) -> Certificate:
    """Certify a model that is never in memory as a whole, from token norm to token norm.

    Args:
        skeleton: the model on the meta device, retrofitted if the stored one is. It is filled layer
            by layer and emptied again; biases and gains stay in it.
        twin: a small model of the same config, on a real device, with layers of all kinds that the
            skeleton has.
        read: gives the stored tensor of a state_dict name. A tensor that is shared is asked for
            under one of its names only.
        source: "weights" or "caps", see `certify`.
        progress: wraps the list of groups of tensors, to show a progress bar say.

    Returns:
        The certificate, with the fingerprint of the stored tensors.

    Raises:
        CertificateError: as `certify`; or the twin lacks a kind of layer.
        ConfigError, UnsupportedModelError, NonFiniteError: as `certify`.
    """
    if source not in SOURCES:
        raise ConfigError(f"certify_layers(source={source!r}): choose 'weights' or 'caps'.")
    check_graph(build(twin))
    _check_kinds(build(skeleton), build(twin))
    shelf = _Shelf(skeleton, read, source)
    for name in [n for n, t in shelf.tensors.items() if t.dim() < 2]:
        shelf.take(name)
    # The graph is built after the small tensors were read, because a kept norm's node holds the
    # gain that the module has when the graph is built.
    graph = build(skeleton)
    entry = _entry_tensors(graph, shelf)
    norms = cap_norms(graph) if source == "caps" else ProvenNorms()
    radius = None
    for group in progress(_groups(graph, shelf)):
        for name in group:
            shelf.take(name)
        owners = frozenset(n.rpartition(".")[0] for name in group for n in shelf.homes[name])
        if source == "weights":
            norms.take(weight_norms(replace(graph, only=owners)))
        else:
            # a table that is a bare Parameter goes by its own name, and not by that of an owner
            tables = frozenset(n for name in group for n in shelf.homes[name])
            check_within_caps(skeleton, block_norms(skeleton, only=owners | tables))
        if not entry.isdisjoint(group):
            radius = radius_of(graph, source)
        for name in group:
            shelf.put_back(name)
    certificate = bound_of(graph, norms, source, radius)
    # The skeleton's buffers have no values. The twin's are made from the same config.
    settings = {**certificate.settings, "buffers": buffers_of(twin)}
    return replace(certificate, weights=shelf.fingerprint(), settings=settings)


def _groups(graph: Graph, shelf: _Shelf) -> list[list[str]]:
    """Names of all tensors with two or more axes, in the groups in which they are read.

    The matrices of one layer are one group. The tensors that the radius is about are one group. The
    head and every other tensor is a group of its own.
    """
    layers = [
        {f"{n}.weight" for branch in layer.branches for n in branch.linears.values()}
        for layer in graph.parts.layers
    ]
    layers.append(_entry_tensors(graph, shelf))
    large = [name for name, t in shelf.tensors.items() if t.dim() >= 2]
    groups = [[name for name in large if name in layer] for layer in layers]
    grouped = {name for group in groups for name in group}
    return [*(g for g in groups if g), *([name] for name in large if name not in grouped)]


def _entry_tensors(graph: Graph, shelf: _Shelf) -> set[str]:
    """Names of the tensors that the radius is about: tables, and maps before the first block."""
    maps = [linear.name for linear in (graph.entry.token_map, graph.entry.patches) if linear]
    owners = {*graph.tables(), *maps}
    return {
        name
        for name, aliases in shelf.homes.items()
        if any({a, a.rpartition(".")[0]} & owners for a in aliases)
    }


def _check_kinds(whole: Graph, small: Graph) -> None:
    """Raise CertificateError if a layer of the model is of a kind that the twin lacks."""
    known = [_kind(small, i) for i in range(len(small.parts.layers))]
    for i, layer in enumerate(whole.parts.layers):
        if _kind(whole, i) not in known:
            raise CertificateError(
                f"{layer.name} is of a kind that the small model, on which the graph is compared, "
                "lacks. Load the whole model and call certify(model)."
            )


def _kind(graph: Graph, index: int) -> list[tuple[str, str]]:
    """The kind of a layer: the classes of all modules inside, by their names relative to it."""
    container = graph.root.get_submodule(graph.parts.layers[index].name)
    return [
        (name, f"{type(m).__module__}.{type(m).__qualname__}")
        for name, m in container.named_modules()
    ]


class _Shelf:
    """The tensors of a skeleton. `take` gives one its values, and `put_back` frees them again.

    Attributes:
        homes: all names of each tensor, by its first name.
        tensors: each tensor as it is on the meta device, by its first name.
    """

    def __init__(self, skeleton: nn.Module, read: Callable[[str], Tensor], source: str) -> None:
        self._root, self._read = skeleton, read
        self._capped = capped_weights(skeleton) if source == "caps" else {}
        self._fingerprint = Fingerprint()
        self.homes: dict[str, list[str]] = {}
        self.tensors: dict[str, Tensor] = {}
        first: dict[int, str] = {}
        for name, tensor in stored_tensors(skeleton).items():
            home = first.setdefault(id(tensor), name)
            self.homes.setdefault(home, []).append(name)
            self.tensors.setdefault(home, tensor)

    def take(self, name: str) -> None:
        """Read a tensor into every place of the skeleton that shares it, and add its fingerprint.

        Raises NonFiniteError if the tensor holds nan or inf.
        """
        meta = self.tensors[name]
        value = self._read(name)
        if value.numel() and not all(bool(torch.isfinite(part).all()) for part in _parts(value)):
            raise NonFiniteError(
                f"{name} holds nan or inf: nothing can be proven. Load a sound checkpoint."
            )
        for alias in self.homes[name]:
            if alias in self._capped:
                self._fingerprint.add_capped(alias, value, self._capped[alias])
            elif alias == name:
                self._fingerprint.add(name, value)
            else:
                self._fingerprint.add_alias(alias, name)
        self._place(name, value, meta)

    def put_back(self, name: str) -> None:
        """Put the tensor without values back in place, so that the values are freed."""
        self._place(name, self.tensors[name], self.tensors[name])

    def _place(self, name: str, value: Tensor, meta: Tensor) -> None:
        if isinstance(meta, nn.Parameter):
            value = nn.Parameter(value.detach(), requires_grad=meta.requires_grad)
        for alias in self.homes[name]:
            owner, _, leaf = alias.rpartition(".")
            module: Any = self._root.get_submodule(owner)
            home = module._parameters if leaf in module._parameters else module._buffers
            home[leaf] = value

    def fingerprint(self) -> str:
        return self._fingerprint.value()


def _parts(value: Tensor) -> Iterator[Tensor]:
    """A tensor in pieces of `_ROWS` rows, so that temporaries stay small."""
    yield from (value.split(_ROWS) if value.dim() else (value,))
