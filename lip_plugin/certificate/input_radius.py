"""`radius_of(graph, source)`: a bound on the token norm of what enters the first block.

A certificate holds on the ball of this radius. docs/maths.md, section 12, has the proofs.
"""

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
    """Bound the token norm of what enters the first block, for all inputs that the entry describes.

    For token models this is the largest RMS norm of a sum of one row from each table. From weights,
    all such sums are looked at, unless they are too many (see `sum_rms_max_upper`). From caps, the
    caps of the tables are added up.

    For images, a patch whose entries are at most `pixel_max` in absolute value has RMS norm at most
    `pixel_max`. So its embedding has RMS norm at most N(W) pixel_max + RMS(bias), where N(W) is the
    RMS->RMS norm of the patch matrix. The row "first" takes the place of one patch.

    Args:
        graph: the graph of the model.
        source: "weights" measures tables and maps. "caps" uses their caps alone.

    Returns:
        The radius, rounded up.

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
    """Bound on the largest RMS norm of a sum of one row from each table."""
    if source == "caps":
        return add(*(mul(ROW_SLACK, _cap(t.name, t.module), up(abs(t.scale))) for t in tables))
    return up(sum_rms_max_upper([t.read() for t in tables]))


def _mapped(graph: Graph, linear: Linear, r: Decimal, source: str) -> Decimal:
    """Bound on the RMS norm of W x + b, for all x of RMS norm at most r."""
    if source == "caps":
        n = mul(CAP_SLACK, _cap(linear.name, graph.root.get_submodule(linear.name)))
    else:
        sigma = up(float(sigma_max_upper(linear.weight().detach())))
        n = mul(sigma, root(div(up(linear.d_in), up(linear.d_out))))
    return add(mul(n, r), rms(linear.bias()))


# The cap of a table (in RMS norm) or of a map (in RMS->RMS norm), which is one block each.
def _cap(name: str, module: Any) -> Decimal:
    layout = getattr(module, "layout", None)
    if layout is None or layout.segments[0].cap is None:
        raise CertificateError(f"{name} has no cap; certify(model, source='weights') measures it.")
    return up(layout.segments[0].cap)
