"""The numbers that every bound starts from: proven norms of the weights.

`weight_norms` measures the weights as they are. `cap_norms` gives bounds on the norms of all
weights that keep the caps. Both give `ProvenNorms`, which the rules of the nodes read.
"""

from __future__ import annotations

from decimal import Decimal

import torch
from torch import Tensor, nn

from lip_plugin.certificate.graph.base import LinearNorms, ProvenNorms
from lip_plugin.certificate.graph.build import Graph
from lip_plugin.certificate.graph.containers import walk
from lip_plugin.certificate.graph.decimals import div, mul, norm2, root, up
from lip_plugin.errors import CertificateError, NonFiniteError
from lip_plugin.linalg.norms import row_rms_max_upper
from lip_plugin.linalg.rows import row_distance_max_upper
from lip_plugin.model.batches import batches
from lip_plugin.model.heads import linear_layout
from lip_plugin.model.layers import is_transposed
from lip_plugin.model.layout import RMS_TO_RMS, Layout, Segment

# How far above its cap a block may lie, as a factor. The excess over 1 is at most 1e-5 after a
# float32 projection, 5e-4 in a weight that was loaded or written by others (TOLERANCE in
# optim/enforce.py), and 1e-3 in bf16. Rows of tables need less, because they are checked again as
# they are stored.
CAP_SLACK, ROW_SLACK = Decimal("1.001"), Decimal("1.000000001")


def refuse_non_finite_weights(root: nn.Module) -> None:
    """Raise NonFiniteError, naming the first parameter that holds nan or inf.

    The norms would refuse such a weight as well, but they do not look at biases.
    """
    named = [(name, p.detach()) for name, p in root.named_parameters() if p.numel()]
    extremes = [torch.stack(torch.aminmax(p)).abs().amax().double().cpu() for _, p in named]
    for (name, _), extreme in zip(named, extremes, strict=True):
        if not bool(torch.isfinite(extreme)):
            raise NonFiniteError(
                f"{name} holds nan or inf: nothing can be proven. Load a sound checkpoint."
            )


def weight_norms(graph: Graph) -> ProvenNorms:
    """Prove upper bounds of all norms that the rules ask for, of the weights as they are.

    Blocks of equal shape are measured in one batch, but only within a layer. So the last digit does
    not depend on which other layers are there, and a certificate that is streamed layer by layer
    (see streaming.py) is the same number.

    Args:
        graph: the graph of the model. Its `only` restricts what is measured.

    Raises:
        NonFiniteError: a weight holds nan or inf.
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
    """Full name of a linear node's module. A fused module's nodes are called name[part]."""
    return node.partition("[")[0]


# The norms of these linear maps, and the joint norms of each node whose maps are all among them.
def _measured(graph: Graph, linears: list[tuple[str, str, nn.Module, Tensor]]) -> ProvenNorms:
    norms = matrix_norms(graph, linears)
    for node in walk(graph.body.nodes):
        if hasattr(node, "measure") and all(name in norms for name in node.linear_names()):
            norms.joint[node.name] = node.measure(norms)
    return norms


def matrix_norms(
    graph: Graph, linears: list[tuple[str, str, nn.Module, Tensor]], *, pairs: bool = True
) -> ProvenNorms:
    """Prove upper bounds of the norms of single matrices.

    Args:
        graph: the graph of the model.
        linears: the linear maps, as `Graph.linears` lists them. Rows are measured by themselves for
            gates and for the head only, because no other rule gains by that.
        pairs: whether to measure the distances between rows of the head.

    Returns:
        The norms by the name of the linear map. `joint`, about several maps together, is empty.

    Raises:
        NonFiniteError: a weight holds nan or inf.
    """
    weights: list[Tensor] = []
    layouts: list[Layout] = []
    keys: list[tuple[str, str]] = []  # (name of the linear map, "all", "heads" or "whole")
    for role, name, module, weight in linears:
        wanted = {"all": _one_block(module, weight)}
        if role in ("q", "k", "v", "qkv"):
            # No rule asks for the whole of k or v by itself. So only the heads are measured, and
            # the whole of q.
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
        values = batch.sigma_max_upper()
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
        # No row is longer than sigma_max. For most maps that is enough.
        row = total
        matrix = weight.detach().t() if is_transposed(module) else weight.detach()
        if role in ("gate", "up", "head"):
            row = min(total, mul(up(float(row_rms_max_upper(matrix))), root(up(matrix.shape[1]))))
        # The difference of rows i and j is W^T (e_i - e_j), and norm2(e_i - e_j) is sqrt(2).
        apart = mul(root(up(2)), total)
        if role == "head" and pairs:
            apart = min(apart, up(row_distance_max_upper(matrix)))
        norms[name] = LinearNorms(total, row, whole, heads_of, apart)
    return norms


# The layout of a weight that is measured as one block.
def _one_block(module: nn.Module, weight: Tensor) -> Layout:
    transposed = is_transposed(module)
    rows = weight.shape[1 if transposed else 0]
    return Layout(RMS_TO_RMS, transposed, (Segment("all", 0, 1, rows, 0.0),))


def cap_norms(graph: Graph) -> ProvenNorms:
    """Bounds of the norms of all weights that keep the caps, up to `CAP_SLACK`.

    They come from the caps alone, so they are true after every step of a run.

    Args:
        graph: the graph of the retrofitted model.

    Raises:
        CertificateError: a layer has no cap.
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
        # A fused gate and up has one node for each part. Such a node takes the segments of its own
        # part, and any other node takes all segments.
        segments = [s for s in layout.segments if s.role == role] or list(layout.segments)
        # A cap c on a block in RMS->RMS norm is a cap of c sqrt(d_out / d_in) on its sigma_max.
        sigma = {
            s.role: mul(CAP_SLACK, up(s.cap), root(div(up(s.d_out), up(d_in)))) for s in segments
        }
        # If heads are interleaved, a role has one segment for each head.
        counts = {r: sum(s.count for s in segments if s.role == r) for r in sigma}
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
