"""radius_of(graph, source): bound on the token norm of what enters the first block."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from lip_plugin.certificate.graph.base import ProvenNorms, rms
from lip_plugin.certificate.graph.build import Graph
from lip_plugin.certificate.graph.decimals import add, div, mul, root, up
from lip_plugin.certificate.graph.entry import Table
from lip_plugin.certificate.graph.nodes import Linear
from lip_plugin.certificate.weight_norms import CAP_SLACK, ROW_SLACK
from lip_plugin.errors import CertificateError
from lip_plugin.linalg.norms import sigma_max_upper, sum_rms_max_upper


def radius_of(graph: Graph, source: str) -> Decimal:
    """Bound on the token norm of what enters the first block, for every input that the entry describes.

    Sums of one row of each table, all of them; from caps their largest RMS norms add up. Images: a patch of entries at most
    `pixel_max` has RMS norm at most that, so its embedding at most N(W) pixel_max + RMS(bias).

    Args:
        source: "weights" measures, "caps" uses the caps of tables and maps alone.

    Raises:
        CertificateError: source "caps", and a table or map has no cap.
    """
    entry, tables = graph.entry, dict(graph.entry.tables)
    if entry.patches is not None:
        patch = _mapped(graph, entry.patches, up(entry.pixel_max), source)
        first = tables.pop("first")
        total = add(max(patch, _sums([first], source)), _sums(tables.values(), source))
    elif entry.token_map is not None:
        token = _sums([tables.pop("token")], source)
        total = add(_mapped(graph, entry.token_map, token, source), _sums(tables.values(), source))
    else:
        total = _sums(tables.values(), source)
    return total if entry.norm is None else entry.norm.bound(total, ProvenNorms()).radius


def _sums(tables: Iterable[Table], source: str) -> Decimal:
    """Largest RMS norm of a sum of one row of each."""
    if source == "caps":
        return add(*(mul(ROW_SLACK, _cap(t.name, t.module), up(abs(t.scale))) for t in tables))
    return up(sum_rms_max_upper([t.read() for t in tables]))


def _mapped(graph: Graph, linear: Linear, r: Decimal, source: str) -> Decimal:
    """Bound on W x + b for RMS norms of x up to r."""
    if source == "caps":
        n = mul(CAP_SLACK, _cap(linear.name, graph.root.get_submodule(linear.name)))
    else:
        sigma = up(float(sigma_max_upper(linear.weight().detach())))
        n = mul(sigma, root(div(up(linear.d_in), up(linear.d_out))))
    return add(mul(n, r), rms(linear.bias()))


def _cap(name: str, module: Any) -> Decimal:
    layout = getattr(module, "layout", None)
    if layout is None or layout.segments[0].cap is None:
        raise CertificateError(f"{name} has no cap; certify(model, source='weights') measures it.")
    return up(layout.segments[0].cap)
