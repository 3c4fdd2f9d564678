"""A proven bound on every activation of a model, beside the largest one that was seen on a batch.

Use the report to see which number formats can hold all activations without a scale. It also bounds
the entropy of every attention from below. The proofs are those of the certificate's radii
(docs/maths.md, sections 4, 6 and 11), applied to single entries. An entry of a vector in R^d is at
most sqrt(d) times its RMS norm. An entry of W x is at most (largest row norm2 of W) sqrt(d_in)
times the RMS norm of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.certificate.comparison.compare import check_graph, check_on_inputs
from lip_plugin.certificate.graph.analysis import Analysis
from lip_plugin.certificate.graph.attention import Attention, smallest_entropy_lower
from lip_plugin.certificate.graph.base import ProvenNorms, Watch, largest
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.graph.containers import Chain, Parallel, Residual
from lip_plugin.certificate.graph.decimals import INF, add, mul, root, to_float, up
from lip_plugin.certificate.graph.inputs import refuse_odd_inputs
from lip_plugin.certificate.graph.joint_attention import AttentionOut
from lip_plugin.certificate.graph.joint_bounds import GatedMlp, MlpResidual
from lip_plugin.certificate.graph.nodes import (
    Activation,
    Gate,
    Linear,
    Norm,
    OneToken,
    Scale,
    Softcap,
)
from lip_plugin.certificate.graph.pairs import Modulus, Stacked
from lip_plugin.certificate.input_radius import radius_of
from lip_plugin.certificate.weight_norms import refuse_non_finite_weights, weight_norms
from lip_plugin.errors import CertificateError
from lip_plugin.linalg.norms import row_rms_max_upper
from lip_plugin.tables import table

# The largest finite number of each format. Source of the two float8 formats: OCP 8-bit floating
# point specification 1.0 (2023). That of bfloat16 is (2 - 2^-7) 2^127.
FORMATS = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "bfloat16": (2 - 2**-7) * 2.0**127}


@dataclass(frozen=True)
class Activations:
    """One line of a report: the size of the entries that one node puts out.

    Attributes:
        name: the module.
        kind: which of its outputs, such as "linear" or "residual".
        proven: no entry is larger in absolute value, for any sequence of tokens.
        seen: the largest absolute value on the batch.
    """

    name: str
    kind: str
    proven: float
    seen: float

    def fits(self) -> tuple[str, ...]:
        """The formats that hold every entry without a scale.

        This is proven, so it holds for every sequence of tokens.
        """
        return tuple(name for name, top in FORMATS.items() if self.proven <= top)


@dataclass(frozen=True)
class Entropy:
    """The entropy of one attention's last row, in nats.

    Attributes:
        name: the module.
        proven: no head has a smaller entropy there, for any sequence of as many tokens.
        seen: the smallest one of all heads on the batch.
    """

    name: str
    proven: float
    seen: float


@dataclass(frozen=True)
class ActivationReport:
    """Bounds on all activations and attention entropies of a model. It prints as a table.

    Attributes:
        rows: one line for every activation.
        entropies: one line for every attention.
        tokens: number of tokens of the batch, for which the entropies are stated.
    """

    rows: tuple[Activations, ...]
    entropies: tuple[Entropy, ...]
    tokens: int

    def fits(self, dtype: str) -> bool:
        """Whether all activations are proven to lie in the range of a format.

        Args:
            dtype: a key of `FORMATS`.
        """
        return all(row.proven <= FORMATS[dtype] for row in self.rows)

    def __str__(self) -> str:
        head = ("activation", "what", "proven <=", "seen", "range proven to suffice")
        rows = [(r.name, r.kind, r.proven, r.seen, (r.fits() or ("none",))[0]) for r in self.rows]
        formats = ("<", "<10", "10.4g", "9.4g", "<")
        seen = table(head, rows, formats, most=40, closed=True)
        width = min(max(len(r.name) for r in self.rows), 40)
        entropies = table(
            None,
            [(e.name, f"proven >= {e.proven:.4f}  seen {e.seen:.4f}") for e in self.entropies],
            (f"<{width}", "<"),
            most=width,
        )
        title = f"attention entropy of the last of {self.tokens} tokens, nats"
        return "\n".join([seen, title, *entropies.splitlines()])


@dataclass(frozen=True)
class _Reach:
    """What leaves a node.

    Attributes:
        radius: bound on the token norm, for all sequences of tokens.
        entry: bound on the largest absolute entry, for all sequences of tokens.
        x: the value on the batch, float64.
    """

    radius: Any
    entry: Any
    x: Tensor


class _Notes:  # the lines of a report, collected while the graph is walked
    def __init__(self, norms: ProvenNorms) -> None:
        self.norms = norms
        self.rows: list[Activations] = []
        self.entropies: list[Entropy] = []

    def add(self, name: str, kind: str, reach: _Reach) -> _Reach:
        """Note one output.

        Its entries are also bounded by sqrt(d) times its RMS norm, and the smaller bound is kept.
        """
        entry = min(reach.entry, mul(reach.radius, root(up(reach.x.shape[-1]))))
        self.rows.append(Activations(name, kind, to_float(entry), float(reach.x.abs().amax())))
        return _Reach(reach.radius, entry, reach.x)


def activation_report(model: nn.Module, inputs: Tensor) -> ActivationReport:
    """Bound every activation and every attention entropy, and show beside it what a batch attains.

    The bounds hold for every sequence of tokens, and for every image whose entries are at most the
    config's `pixel_max` in absolute value. They are about real arithmetic on the weights as stored.
    The batch only fills the columns `seen`, and its length is the one that the entropies are for.
    Print the result to get a table.

    Args:
        model: a model of a known family.
        inputs: token ids [batch, tokens], or pixels [batch, channels, height, width].

    Raises:
        CertificateError: a node has no rule here, or the graph does not reproduce the model.
        ConfigError: the ids hold one that the model takes for padding.
        UnsupportedModelError, NonFiniteError: as in `certify`.
    """
    with torch.no_grad():
        graph = build(model)
        refuse_non_finite_weights(graph.root)
        refuse_odd_inputs(graph, inputs)
        check_graph(graph)
        check_on_inputs(graph, inputs)
        notes = _Notes(weight_norms(graph))
        radius = up(to_float(radius_of(graph, "weights")))
        x = graph.embed(inputs, torch.float64)
        reach(graph.body, notes.add("embeddings", "sum", _Reach(radius, _entry(graph), x)), notes)
    return ActivationReport(tuple(notes.rows), tuple(notes.entropies), x.shape[1])


def _entry(graph: Graph) -> Decimal:
    """Bound on the largest entry of what enters the first block.

    A sum of one row of each table has at most the sum of the tables' largest entries. Where more
    than a sum happens there is no such bound, and the RMS norm has to serve.
    """
    entry = graph.entry
    if entry.patches is not None or entry.token_map is not None or entry.norm is not None:
        return INF
    return add(*(largest(table.read()) for table in entry.tables.values()))


def _missing(node: Any) -> CertificateError:
    return CertificateError(
        f"{getattr(node, 'name', node)} is {type(node).__name__}: "
        "no bound on its entries is proven here."
    )


# reach(node, at, notes) takes what enters a node, notes its outputs, and returns what leaves it.
reach = Analysis("reach of activations", _missing)


@reach.rule(Linear)
def linear_reach(node: Linear, at: _Reach, notes: _Notes) -> _Reach:
    return notes.add(node.name, "linear", _linear(node, at, notes))


# What leaves a linear map, without a note of it.
def _linear(node: Linear, at: _Reach, notes: _Notes) -> _Reach:
    w = node.weight().detach()
    # An entry of W x is at most `row` times the RMS norm of x, and at most `taxi` times the largest
    # entry of x. The factor 1 + 1e-12 covers n roundings of 1e-16 in the sum.
    row = mul(up(float(row_rms_max_upper(w))), up(node.d_in))
    taxi = float(w.double().abs().sum(1).amax()) * (1 + 1e-12)
    entry = add(min(mul(row, at.radius), mul(up(taxi), at.entry)), largest(node.bias()))
    return _Reach(node.bound(at.radius, notes.norms).radius, entry, node.run(at.x))


@reach.rule(Scale)
def scale_reach(node: Scale, at: _Reach, notes: _Notes) -> _Reach:
    s = up(abs(node.scale))
    return _Reach(mul(s, at.radius), mul(s, at.entry), node.run(at.x))


@reach.rule(Norm)
def norm_reach(node: Norm, at: _Reach, notes: _Notes) -> _Reach:
    radius = node.bound(at.radius, notes.norms).radius
    return notes.add(
        node.name, "norm", _Reach(radius, mul(radius, root(up(at.x.shape[-1]))), node.run(at.x))
    )


@reach.rule(Activation)
def activation_reach(node: Activation, at: _Reach, notes: _Notes) -> _Reach:
    f = node.factor
    return notes.add(
        node.name, "activation", _Reach(mul(f, at.radius), mul(f, at.entry), node.run(at.x))
    )


@reach.rule(Stacked)
def stacked_reach(node: Stacked, at: _Reach, notes: _Notes) -> _Reach:
    parts = [notes.add(n.name, "linear", _linear(n, at, notes)) for n in (node.gate, node.up)]
    radius = node.bound(at.radius, notes.norms).radius
    return _Reach(radius, max(part.entry for part in parts), node.run(at.x))


@reach.rule(Modulus)
def modulus_reach(node: Modulus, at: _Reach, notes: _Notes) -> _Reach:
    # sqrt(g^2 + u^2) / sqrt(2) is at most the larger one of abs(g) and abs(u).
    return notes.add(node.name, "activation", _Reach(at.radius, at.entry, node.run(at.x)))


@reach.rule(Gate)
def gate_reach(node: Gate, at: _Reach, notes: _Notes) -> _Reach:
    g = notes.add(node.gate.name, "linear", _linear(node.gate, at, notes))
    u = notes.add(node.up.name, "linear", _linear(node.up, at, notes))
    radius = node.bound(at.radius, notes.norms).radius
    entry = mul(node.act.factor, g.entry, u.entry)
    return notes.add(node.name, "gated", _Reach(radius, entry, node.run(at.x)))


@reach.rule(Attention)
def attention_reach(node: Attention, at: _Reach, notes: _Notes) -> _Reach:
    inner: dict[int, _Reach] = {}
    for p in (node.q, node.k, node.v):
        if id(p.linear) not in inner:
            inner[id(p.linear)] = notes.add(p.linear.name, "linear", _linear(p.linear, at, notes))
    watch = Watch()
    y = node.run(at.x, watch)
    tokens = at.x.shape[-2]
    bound = to_float(node.logit_bound(at.radius, notes.norms))
    if node.softcap is not None:
        bound = min(bound, abs(node.softcap))
    visible = tokens if node.window is None else min(tokens, node.window)
    notes.entropies.append(
        Entropy(node.name, smallest_entropy_lower(bound, visible), watch.smallest_entropy)
    )
    # An entry of a mixture of values is at most the largest entry of the values.
    entry = inner[id(node.v.linear)].entry
    return notes.add(
        node.name, "mixture", _Reach(node.bound(at.radius, notes.norms).radius, entry, y)
    )


@reach.rule(Chain, AttentionOut, GatedMlp)
def chain_reach(node: Chain, at: _Reach, notes: _Notes) -> _Reach:
    for part in node.nodes:
        at = reach(part, at, notes)
    return at


@reach.rule(Residual, MlpResidual)
def residual_reach(node: Residual, at: _Reach, notes: _Notes) -> _Reach:
    branch = reach(node.branch, at, notes)
    radius = min(add(at.radius, branch.radius), node.bound(at.radius, notes.norms).radius)
    return notes.add(
        node.name, "residual", _Reach(radius, add(at.entry, branch.entry), at.x + branch.x)
    )


@reach.rule(Parallel)
def parallel_reach(node: Parallel, at: _Reach, notes: _Notes) -> _Reach:
    parts = [reach(branch, at, notes) for branch in node.branches]
    radius = min(
        add(at.radius, *(b.radius for b in parts)), node.bound(at.radius, notes.norms).radius
    )
    return notes.add(
        node.name,
        "residual",
        _Reach(radius, add(at.entry, *(b.entry for b in parts)), node.run(at.x)),
    )


@reach.rule(Softcap)
def softcap_reach(node: Softcap, at: _Reach, notes: _Notes) -> _Reach:
    cap = up(abs(node.cap))
    return notes.add(
        node.name, "softcap", _Reach(min(at.radius, cap), min(at.entry, cap), node.run(at.x))
    )


@reach.rule(OneToken)
def one_token_reach(node: OneToken, at: _Reach, notes: _Notes) -> _Reach:
    return _Reach(at.radius, at.entry, node.run(at.x))
