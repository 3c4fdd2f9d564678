"""Norms, activations and rotations on their own: there a rule rests on more than weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from lip_plugin.certificate.comparison.difference import TOLERANCE, relative_difference
from lip_plugin.certificate.graph.attention import Attention
from lip_plugin.certificate.graph.base import Node
from lip_plugin.certificate.graph.containers import walk
from lip_plugin.certificate.graph.nodes import Activation, Norm
from lip_plugin.certificate.graph.pairs import Modulus
from lip_plugin.errors import CertificateError
from lip_plugin.model.scales import branch_scale


def nodes_to_check(nodes: Any) -> Iterator[Node]:
    """All nodes, also those in containers, and the norms behind q and k of an attention."""
    for node in walk(nodes):
        if isinstance(node, Attention):
            yield from (n for n in (node.q_norm, node.k_norm, node) if n is not None)
        else:
            yield node


def check_node(node: Node) -> None:
    """Compare a node with the library's module, on inputs that show all of what its rule rests on.

    A norm is compared on both sides of its floor, or of sqrt(eps). An activation is compared over
    all of its range. A rotation must do nothing but turn pairs and multiply by its scale.

    Raises CertificateError if the node computes something else.
    """
    generator = torch.Generator().manual_seed(2)
    if isinstance(node, Norm):
        weight = next(node.module.parameters(), None)
        x = torch.randn(8, node.width, generator=generator, dtype=torch.float64)
        x = x if weight is None else x.to(weight.device)
        x = (
            x
            * max(node.eps**0.5, node.floor, 1e-6)
            * torch.linspace(0.3, 3.0, 8, dtype=x.dtype, device=x.device)[:, None]
        )
        difference = relative_difference(node.run(x), node.module(x).double())
    elif isinstance(node, Activation):
        x = torch.linspace(-30.0, 30.0, 961, dtype=torch.float64)
        # The factor of a branch may sit on the activation's output, as a hook (OPT). It is a node
        # of its own. Any other hook is a difference.
        expected = node.act(x) / branch_scale(node.act)
        # There is no float32 inside an activation. So it is compared to 1e-9, that is to 1e-5 of
        # `TOLERANCE`.
        difference = relative_difference(node.run(x), expected) * 1e5
    elif isinstance(node, Modulus):
        g, u = torch.randn(2, 961, generator=generator, dtype=torch.float64) * torch.logspace(
            -4, 2, 961, dtype=torch.float64
        )
        expected = node.module(g) * u
        difference = relative_difference(node.run(torch.cat([g, u])), expected) * 1e5
    elif isinstance(node, Attention) and node.rotary is not None:
        difference = _not_a_rotation(node)
    else:
        return
    if not difference <= TOLERANCE:
        raise CertificateError(
            f"{node.name} does not compute what its rule is proven for (off by {difference:.2e}): "
            "a hook, a patched forward or another eps. Take it off, then certify."
        )


def _not_a_rotation(node: Attention) -> float:
    """How far the library's cos and sin are from turning pairs and multiplying by the scale.

    It is inf if their shapes are not those of a rotation.
    """
    positions = torch.tensor([[0, 1, 2, 7, 100, 1000, 4095]], device=node.q.linear.weight().device)
    x = torch.zeros(1, 7, node.d_in, dtype=torch.float64, device=positions.device)
    cos, sin = node.rotary(x, positions)
    half = cos.shape[-1] // 2
    if (
        cos.shape[:2] != (1, 7)
        or not 0 < 2 * half == cos.shape[-1] <= node.d_head
        or sin.shape != cos.shape
    ):
        return math.inf
    scale = node.rotary.scale**2
    off = ((cos.square() + sin.square()) / scale - 1.0).abs().max()
    halves = max((t[..., :half] - t[..., half:]).abs().max() for t in (cos, sin))
    return float(torch.maximum(off, halves))
