"""A check that two models share everything that the drift's rules do not look at.

The rules of rules.py compare weights. Rotations, masks and the places of rows in the tables are no
weights. For example, a model trained on for longer texts may have another base frequency of its
rotation. It then turns every key differently although not one weight has changed. Such pairs are
refused here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.fingerprint import settings_of
from lip_plugin.certificate.graph.attention import Attention
from lip_plugin.certificate.graph.build import Graph
from lip_plugin.certificate.graph.containers import walk
from lip_plugin.errors import ConfigError

# A setting of the config whose name holds one of these may change how keys are turned.
_TURNS = ("rope", "rotary", "position_embeddings", "max_position")
_PLACES = (0, 1, 2, 7, 100, 1000, 4095)  # positions at which two rotations are compared


def refuse_unlike_settings(base: Graph, tuned: Graph) -> None:
    """Check that two graphs look up rows, mask tokens and turn keys alike.

    Raises:
        ConfigError: they do not. The message names what differs.
    """
    _same("the input", _entry_of(base), _entry_of(tuned))
    pairs = [[n for n in walk(g.body.nodes) if isinstance(n, Attention)] for g in (base, tuned)]
    _same("the number of attentions", *(len(found) for found in pairs))
    for b, t in zip(*pairs, strict=True):
        _same(b.name, _attention_of(b), _attention_of(t))
    _same_forward(base, tuned)
    if not any(b.rotary is not None for b in pairs[0]):
        return
    settings = [
        {k: v for k, v in settings_of(g.root).items() if any(word in k for word in _TURNS)}
        for g in (base, tuned)
    ]
    _same("the rotation's config", *settings)
    for b, t in zip(*pairs, strict=True):
        if not all(torch.equal(x, y) for x, y in zip(_turns(b), _turns(t), strict=True)):
            raise ConfigError(
                f"drift: {b.name} turns queries and keys otherwise in the tuned model (another "
                "base frequency, or a model cast to another dtype, which rounds frequencies). "
                "Load both in one dtype, with one rotation."
            )


# Raise ConfigError unless b equals t.
# Settings that may differ: they are in the graph already (and compared there), or enter no forward.
_FREE = ("lipschitz", "floors", "tie_word_embeddings", "activation", "hidden_act", "pad_token_id")


def _same_forward(base: Graph, tuned: Graph) -> None:
    """Raise ConfigError if a setting or a buffer differs that a forward may read and no node has.

    Masks and positions are such: another window or another order of positions is another function
    with not one weight changed.
    """
    b, t = (settings_of(g.root) for g in (base, tuned))
    for key in sorted({*b, *t}):
        turns = any(word in key for word in _TURNS)  # compared below, as rotations
        if turns or key.startswith(_FREE) or key not in b or key not in t:
            continue
        if b[key] != t[key]:
            _same(f"the config's {key}", b[key], t[key])
    held = [dict(g.root.named_buffers()) for g in (base, tuned)]
    for name in sorted(held[0].keys() & held[1].keys()):
        x, y = held[0][name], held[1][name].to(held[0][name].device)
        if "inv_freq" in name or x.numel() == 1 or x.dtype != y.dtype:
            continue  # rotations are compared below, and scales are in the graph
        if x.shape != y.shape or not torch.equal(x, y):
            _same(f"the buffer {name}", tuple(x.shape), f"{tuple(y.shape)} of other values")


def _same(where: str, b: Any, t: Any) -> None:
    if b != t:
        raise ConfigError(
            f"drift: {where} is {b} in the base and {t} in the tuned model, and a drift is "
            "proven between models of one structure. Compare a model with what it was tuned from."
        )


# How the inputs become what enters the first block, without the weights of it.
def _entry_of(graph: Graph) -> tuple:
    entry = graph.entry
    offsets = tuple((role, table.offset) for role, table in sorted(entry.tables.items()))
    maps = tuple(n is not None for n in (entry.patches, entry.token_map, entry.norm))
    return offsets, maps, entry.patch, entry.image


def _attention_of(a: Attention) -> tuple:
    """Everything of an attention, besides weights, that its drift rule takes to be equal."""
    bias = None if a.bias is None else (tuple(a.bias.weight.shape), a.bias.content, a.bias.causal)
    heads = tuple((p.start, p.stop, p.heads) for p in (a.q, a.k, a.v))
    norms = tuple(type(n).__name__ for n in (a.q_norm, a.k_norm))
    turned = None if a.rotary is None else (a.rotary.layer_type, a.rotary.scale)
    settings = (a.tau, a.d_head, a.d_in, a.whole_norms, a.softcap, a.causal, a.window)
    return settings, heads, norms, bias, turned


def _turns(a: Attention) -> list[Tensor]:
    """Cosines and sines at a few positions, and the frequencies that they come from."""
    if a.rotary is None:
        return []
    device = a.q.linear.weight().device
    x = torch.zeros(1, len(_PLACES), a.d_in, dtype=torch.float64, device=device)
    found = list(a.rotary(x, torch.tensor([_PLACES], device=device)))
    return [f.detach().double().cpu() for f in (*found, *a.rotary.module.buffers())]
