"""The numbers that a bound starts from: proven norms of the weights, or of everything within the caps."""

from __future__ import annotations

from decimal import Decimal

import torch
from torch import Tensor, nn

from lip_plugin.certificate.graph.base import LinearNorms, ProvenNorms
from lip_plugin.certificate.graph.build import Graph
from lip_plugin.certificate.graph.containers import walk
from lip_plugin.certificate.graph.decimals import div, mul, norm2, root, up
from lip_plugin.errors import CertificateError, NonFiniteError
from lip_plugin.linalg.norms import row_rms_max_upper, sigma_max_upper
from lip_plugin.linalg.rows import row_distance_max_upper
from lip_plugin.model.batches import batches
from lip_plugin.model.heads import linear_layout
from lip_plugin.model.layers import is_transposed
from lip_plugin.model.layout import RMS_TO_RMS, Layout, Segment

# How far above its cap rounding may leave a block, in any dtype: what every projection promises
# (float32 leaves 1e-5, a weight that somebody else wrote 5e-4, bf16 1e-3). Rows are re-checked as stored.
CAP_SLACK, ROW_SLACK = Decimal("1.001"), Decimal("1.000000001")


def refuse_non_finite_weights(root: nn.Module) -> None:
    """Raise NonFiniteError naming the first parameter that holds nan or inf: no norm would see a bias's."""
    named = [(name, p.detach()) for name, p in root.named_parameters() if p.numel()]
    extremes = [torch.stack(torch.aminmax(p)).abs().amax().double().cpu() for _, p in named]
    for (name, _), extreme in zip(named, extremes, strict=True):
        if not bool(torch.isfinite(extreme)):
            raise NonFiniteError(
                f"{name} holds nan or inf: nothing can be proven. Load a sound checkpoint."
            )


def weight_norms(graph: Graph) -> ProvenNorms:
    """Proven norms of the weights as they are, those that the rules ask for.

    Batched by shape within one layer, so that the last digit does not depend on which other layers
    are there: a certificate streamed layer by layer is then the same number.
    """
    norms = ProvenNorms()
    linears = graph.linears()
    layers = [
        {name for branch in layer.branches for name in branch.linears.values()}
        for layer in graph.parts.layers
    ]
    others = {_module(name) for _, name, _, _ in linears} - set().union(*layers)
    for names in (*layers, *({name} for name in sorted(others))):
        norms.take(_measured(graph, [linear for linear in linears if _module(linear[1]) in names]))
    return norms


def _module(node: str) -> str:
    """Full name of the module that a linear node is, or is a part of."""
    return node.partition("[")[0]


def _measured(graph: Graph, linears: list[tuple[str, str, nn.Module, Tensor]]) -> ProvenNorms:
    norms = matrix_norms(graph, linears)
    for node in walk(graph.body.nodes):
        if hasattr(node, "measure") and all(name in norms for name in node.linear_names()):
            norms.joint[node.name] = node.measure(norms)
    return norms


def matrix_norms(
    graph: Graph, linears: list[tuple[str, str, nn.Module, Tensor]], *, pairs: bool = True
) -> ProvenNorms:
    """Proven norms of single matrices, given as `Graph.linears` lists them; rows of gates and of the head by themselves.

    `pairs` False leaves out the distances between rows of the head.
    """
    weights: list[Tensor] = []
    layouts: list[Layout] = []
    keys: list[tuple[str, str]] = []  # (name of the linear map, what is measured of it)
    for role, name, module, weight in linears:
        wanted = {"all": _one_block(module, weight)}
        if role in ("q", "k", "v", "qkv"):
            # no rule asks for the whole of k or v: only heads, and the whole of q, are worth their time
            heads = linear_layout(module, role, 0.0, graph.parts, "head")
            whole_q = linear_layout(module, role, 0.0, graph.parts, "matrix").segments[:1]
            wanted = {"heads": heads}
            if role in ("q", "qkv"):
                wanted["whole"] = Layout(RMS_TO_RMS, heads.transposed, whole_q)
        for what, layout in wanted.items():
            weights.append(weight)
            layouts.append(layout)
            keys.append((name, what))
    sigma: dict[tuple[str, str], dict[str, list[Decimal]]] = {key: {} for key in keys}
    for batch in batches(weights, layouts):
        values = sigma_max_upper(batch.gather()).tolist()
        start = 0
        for view, owner, position in zip(batch.views, batch.owners, batch.positions, strict=True):
            found = [up(v) for v in values[start : start + view.shape[0]]]
            sigma[keys[owner]][layouts[owner].segments[position].role] = found
            start += view.shape[0]
    norms = ProvenNorms()
    for role, name, module, weight in linears:
        heads_of = sigma.get((name, "heads"), {})
        whole = {r: norm2(values) for r, values in heads_of.items()}
        whole |= {r: values[0] for r, values in sigma.get((name, "whole"), {}).items()}
        total = norm2(whole.values()) if whole else sigma[name, "all"]["all"][0]
        row = total  # no row is longer than sigma_max; only gates gain by knowing more
        if role in ("gate", "up", "head"):
            matrix = weight.detach().t() if is_transposed(module) else weight.detach()
            row = min(total, mul(up(float(row_rms_max_upper(matrix))), root(up(matrix.shape[1]))))
        apart = mul(root(up(2)), total)  # norm2(e_i - e_j) is sqrt(2)
        if role == "head" and pairs:
            apart = min(apart, up(row_distance_max_upper(weight.detach())))
        norms[name] = LinearNorms(total, row, whole, heads_of, apart)
    return norms


def _one_block(module: nn.Module, weight: Tensor) -> Layout:
    transposed = is_transposed(module)
    rows = weight.shape[1 if transposed else 0]
    return Layout(RMS_TO_RMS, transposed, (Segment("all", 0, 1, rows, 0.0),))


def cap_norms(graph: Graph) -> ProvenNorms:
    """The same bounds from the caps alone, so true after every step of a run.

    Raises CertificateError for a layer without a cap.
    """
    norms = ProvenNorms()
    for role, name, module, weight in graph.linears():
        layout = getattr(module, "layout", None)
        if layout is None or any(s.cap is None for s in layout.segments):
            raise CertificateError(
                f"{name} has no cap; certify(model, source='weights') measures it instead."
            )
        d_in = weight.shape[0 if layout.transposed else 1]
        heads = {s.role: s for s in linear_layout(module, role, 0.0, graph.parts, "head").segments}
        # of a fused map with a node for each part, the segments of this part; else all of them
        segments = [s for s in layout.segments if s.role == role] or list(layout.segments)
        # a block's cap in RMS->RMS norm is a cap on sigma_max of cap * sqrt(d_out / d_in)
        sigma = {
            s.role: mul(CAP_SLACK, up(s.cap), root(div(up(s.d_out), up(d_in)))) for s in segments
        }
        counts = {
            r: sum(s.count for s in segments if s.role == r) for r in sigma
        }  # heads may be interleaved
        whole = {r: norm2([sigma[r]] * count) for r, count in counts.items()}
        per_head = {r: [sigma[r]] * s.count for r, s in heads.items() if r in sigma}
        total = norm2(whole.values())
        norms[name] = LinearNorms(
            total, max(sigma.values()), whole, per_head, mul(root(up(2)), total)
        )
    for node in walk(graph.body.nodes):
        if hasattr(node, "from_caps"):
            norms.joint[node.name] = node.from_caps(norms)
    return norms
