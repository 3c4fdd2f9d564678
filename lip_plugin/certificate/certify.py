"""`certify(model)`: a proven upper bound of Lip(embeddings -> logits), as a `Certificate`.

Open this file to see how a certificate comes about. `certify` builds the graph of the model,
compares it with the model, and finds the norms of the weights. `bound_of` then applies the rules of
all nodes to these norms, from the first block to the logits.

A certificate comes from one of two sources. "weights" measures the norms of the weights as they are
now. "caps" uses the caps alone, so its number holds for every step of a run that keeps the caps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import torch
from torch import nn

from lip_plugin.certificate.comparison.compare import check_graph
from lip_plugin.certificate.fingerprint import (
    capped_weights,
    fingerprint,
    settings_with_function,
)
from lip_plugin.certificate.graph.attention import Attention, attentions
from lip_plugin.certificate.graph.base import ProvenNorms
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.graph.containers import walk
from lip_plugin.certificate.graph.decimals import INF, ONE, log10, mul, root, to_float, up
from lip_plugin.certificate.graph.nodes import Linear, Scale
from lip_plugin.certificate.input_radius import radius_of
from lip_plugin.certificate.result import Certificate, check_within_caps
from lip_plugin.certificate.weight_norms import (
    CAP_SLACK,
    cap_norms,
    refuse_non_finite_weights,
    weight_norms,
)
from lip_plugin.distributed.gather import sharded_too
from lip_plugin.errors import ConfigError
from lip_plugin.model.adapters import BlockNorms
from lip_plugin.stated import NORM, LayerBound

SOURCES = ("weights", "caps")


@sharded_too
def certify(
    model: nn.Module,
    source: str = "weights",
    *,
    check: bool = True,
    norms: Iterable[BlockNorms] | None = None,
) -> Certificate:
    """Prove an upper bound of Lip(embeddings -> logits), from token norm to token norm.

    Args:
        model: a model of a known family. It may be retrofitted or not, wrapped or not. If it is
            sharded (FSDP2), all processes have to make this call together. The first process
            gathers the model in its main memory, and every process gets the certificate.
        source: `"weights"` measures every norm in float64, rounded up. `"caps"` uses the caps
            alone.
        check: whether to compare the graph with the object that was passed, by a small forward of
            it, before a number is given. The longer part of the comparison, on random weights, is
            not repeated as long as nothing but weights changes.
        norms: for `"caps"` only. A certificate from caps is given only if every block is within its
            cap now. If `block_norms(model)` was called already for the weights as they are, pass
            its result here; otherwise it is called again.

    Returns:
        The certificate, with the fingerprint of what it belongs to.

    Raises:
        CertificateError: the graph does not reproduce the model; or, from caps, a layer has no cap
            or a block is above its cap.
        ConfigError: the source is unknown.
        UnsupportedModelError: a module has no proven rule.
        NonFiniteError: a weight holds nan or inf.
    """
    if source not in SOURCES:
        raise ConfigError(f"certify(source={source!r}): choose 'weights' or 'caps'.")
    with torch.no_grad():
        graph = build(model)
        refuse_non_finite_weights(graph.root)
        if check:
            check_graph(graph)
        proven = weight_norms(graph) if source == "weights" else cap_norms(graph)
        if source == "caps":
            check_within_caps(graph.root, norms)
        return replace(bound_of(graph, proven, source), weights=fingerprint(graph.root, source))


def bound_of(
    graph: Graph, norms: ProvenNorms, source: str, radius_upper: Decimal | None = None
) -> Certificate:
    """Apply the rules of all nodes to given norms, from token norm to token norm.

    Args:
        graph: the graph of the model.
        norms: proven norms of the weights, or of everything within the caps.
        source: "weights" or "caps", whichever the norms are from.
        radius_upper: the radius, if it is known already. A caller that streams the weights passes
            it, because the embeddings are no longer in memory by then.

    Returns:
        A certificate without a fingerprint. The caller adds that.

    Raises:
        CertificateError: source "caps", and a table in front of the first block has no cap.
    """
    # A certificate states its radius as a float. The bound has to hold on exactly that ball, so the
    # radius is rounded up to a float before the rules are applied.
    start = to_float(radius_of(graph, source) if radius_upper is None else radius_upper)
    radius = up(start)
    total, logit, rows = ONE, Decimal(0), []
    # `difference` bounds how fast a difference of two logits moves. Only linear maps and constants
    # keep it finite, so what is left of it at the end is about the head.
    difference = INF
    for node in graph.body.nodes:
        if isinstance(node, Linear):
            difference = mul(total, norms[node.name].pairs, root(up(node.d_in)))
        elif isinstance(node, Scale):
            difference = mul(difference, up(abs(node.scale)))
        else:
            difference = INF
        b = node.bound(radius, norms)
        for before, attention in attentions([node]):
            inner = before.bound(radius, norms).radius
            logit = max(logit, attention.logit_bound(inner, norms))
        total = mul(total, b.lipschitz)
        rows.append(LayerBound(node.name, to_float(radius), to_float(b.lipschitz), log10(total)))
        radius = b.radius
    d_out = _width(reversed(graph.body.nodes), "d_out")
    # z_i - z_j is the inner product of the logits with e_i - e_j, whose 2-norm is sqrt(2). The
    # 2-norm of the logits is sqrt(d_out) times their RMS norm.
    difference = min(difference, mul(root(up(2 * d_out)), total))
    return Certificate(
        lipschitz=to_float(total),
        log10_lipschitz=log10(total),
        radius=start,
        norm=NORM,
        source=source,
        layers=tuple(rows),
        logit_difference=to_float(difference),
        d_in=_width(graph.body.nodes, "d_in"),
        d_out=d_out,
        attention_logit=to_float(logit),
        assumptions=_assumptions(graph, source),
        model=f"{type(graph.root).__name__} ({graph.family.architecture.name})",
        settings=settings_with_function(graph),
    )


def _width(nodes: Iterable[Any], side: str) -> int:
    """The width `side` ("d_in" or "d_out") of the first linear map among the nodes that has it."""
    return next(
        int(getattr(n, side))
        for n in walk(nodes)
        if isinstance(n, (Linear, Attention)) and hasattr(n, side)
    )


# What the bound takes for granted, for the certificate's `assumptions`.
def _assumptions(graph: Graph, source: str) -> tuple[str, ...]:
    lines = [
        "eval mode (no dropout), real arithmetic on the weights as stored; the bound itself is "
        "rounded up. What rounding of the forward pass adds is not in it (forward_rounding_upper "
        "bounds that)",
        "inputs of the first block have token norm at most the radius, as every sum of one row "
        "from each embedding table has (embeddings of another origin may not)",
        "the graph's forward was compared with the model's own on random weights; attention "
        "functions and activations of the libraries are what they were then",
    ]
    if graph.patches is not None:
        lines[1] = (
            "inputs of the first block have token norm at most the radius, as those of every image "
            "of the size that the model was built for have, whose pixel entries, after "
            f"normalization, are at most {graph.entry.pixel_max:g} in absolute value"
        )
    if source == "caps":
        lines.append(f"every block is within its cap times {CAP_SLACK}")
        # They are found by the modules that are constrained, and not by names known beforehand,
        # because peft moves a weight into a `base_layer` and so renames it.
        caps = capped_weights(graph.root)
        free = [n for n, p in graph.root.named_parameters() if n not in caps and p.requires_grad]
        if free:
            lines.append(
                f"biases, gains of kept norms and what else has no cap ({len(free)} tensors) as "
                "they are now: after a later step it needs a new certificate"
            )
    return tuple(lines)
