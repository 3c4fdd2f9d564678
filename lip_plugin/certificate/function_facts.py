"""Everything that a model's function depends on besides its weights, as plain text by place.

Such facts are a scale, an eps, an activation, a window, the active adapters and their scaling. They
are no weights, and most of them are in no config, yet another value means another function. So a
certificate carries them, and `Certificate.verify` compares them with those of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from lip_plugin.certificate.graph.attention import Attention, HeadRows
from lip_plugin.certificate.graph.build import Graph
from lip_plugin.certificate.graph.containers import walk
from lip_plugin.certificate.graph.nodes import Norm, Scale
from lip_plugin.model.adapters import wrapper_facts

_PLAIN = (bool, int, float, str, type(None))
_NAMES = ("name", "role")  # these fields tell where a node is, and not what it computes


def function_of(graph: Graph) -> dict[str, str]:
    """What is computed at each place of a graph, without the weights, as {place: text}.

    If two models have equal weights and equal facts, they compute the same function.
    """
    found: dict[str, str] = {}
    for place, text in _facts(graph):
        key, count = place, 1
        while key in found:  # several nodes may belong to one module, and so have one name
            count += 1
            key = f"{place} ({count})"
        found[key] = text
    return found


# (place, fact) of the entry, of every node that has facts, and of every wrapped linear layer.
def _facts(graph: Graph) -> Iterator[tuple[str, str]]:
    entry = graph.entry
    for role, table in sorted(entry.tables.items()):
        yield table.name, f"{role} rows from {table.offset}, times {table.scale!r}"
    inputs = (
        f"patch={entry.patch} image={entry.image} pixel_max={entry.pixel_max!r} "
        f"padding={entry.padding!r}"
    )
    yield "inputs", inputs
    if entry.norm is not None:
        yield entry.norm.name, _text(entry.norm)
    for node in walk(graph.body.nodes):
        text = _text(node)
        if text != type(node).__name__:
            yield node.name, text
    for _, name in graph.parts.linears():
        facts = wrapper_facts(graph.root.get_submodule(name))
        if facts:
            yield name, facts


def _text(node: Any) -> str:
    """The class of a node and its plain fields. Of an attention, also what its parts compute."""
    parts = [type(node).__name__]
    for f in fields(node) if is_dataclass(node) else ():
        value = getattr(node, f.name)
        if f.name in _NAMES:
            continue
        if isinstance(value, _PLAIN):
            parts.append(f"{f.name}={value!r}")
        elif isinstance(value, (Norm, Scale)):
            parts.append(f"{f.name}=({_text(value)})")
        elif isinstance(value, HeadRows):
            parts.append(f"{f.name}=rows {value.start}:{value.stop} in {value.heads} heads")
        elif isinstance(value, nn.Module) and f.name == "act":
            parts.append(f"act={type(value).__name__}")
    if isinstance(node, Attention):
        bias, rotary = node.bias, node.rotary
        if bias is not None:
            parts.append(f"bias=(content={bias.content} causal={bias.causal})")
        if rotary is not None:
            parts.append(f"rotary=(layer_type={rotary.layer_type!r} scale={rotary.scale!r})")
    return " ".join(parts)


def buffers_of(root: nn.Module) -> dict[str, str]:
    """What a model's buffers hold that no file stores (frequencies, positions), by name.

    Two numbers to four digits stand for the values, so that another machine, whose last digits are
    others, writes the same. Buffers without values (on the meta device) are left out.
    """
    found = {}
    for name, module in root.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            value = module._buffers.get(leaf)
            if value is None or value.is_meta or value.numel() < 2:  # a single one is a scale
                continue
            key = f"{name}.{leaf}" if name else leaf
            if not value.is_floating_point():
                held = value.detach().cpu().contiguous().numpy().tobytes()
                found[key] = hashlib.sha256(held).hexdigest()[:16]
                continue
            flat = value.detach().double().flatten()
            weights = torch.linspace(1.0, 2.0, len(flat), dtype=flat.dtype, device=flat.device)
            numbers = (float(flat @ weights), float(flat.abs().sum()))
            found[key] = " ".join(f"{number:.3e}" for number in numbers)
    return found
