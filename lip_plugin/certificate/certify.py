"""certify(model) -> Certificate: a proven upper bound on Lip(embeddings -> logits)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from typing import Any

import torch
from torch import nn

from lip_plugin.certificate.attention import Attention, smallest_entropy_lower
from lip_plugin.certificate.build import Graph, build
from lip_plugin.certificate.compare import check_graph
from lip_plugin.certificate.fingerprint import (
    capped,
    check_belongs,
    check_within_caps,
    fingerprint,
    settings_of,
)
from lip_plugin.certificate.function import function_of
from lip_plugin.certificate.graph import Linear, Norms, Scale, walk
from lip_plugin.certificate.measure import CAP_SLACK, cap_norms, refuse_non_finite, weight_norms
from lip_plugin.certificate.nodes import attentions
from lip_plugin.certificate.radius import radius_of
from lip_plugin.certificate.upper import INF, ONE, div, log10, mul, root, to_float, up
from lip_plugin.certificate.whole import has_shards, on_first_process, sharded_too
from lip_plugin.errors import CertificateError, ConfigError
from lip_plugin.optim.projection import BlockNorms

FORMAT = "lip_plugin.certificate/2"
_WITHOUT_FINGERPRINT = "lip_plugin.certificate/1"
NORM = "token norm (largest RMS norm of a token) -> token norm"
SOURCES = ("weights", "caps")


@dataclass(frozen=True)
class LayerBound:
    """One line of a certificate.

    Attributes:
        name: module of the sub-block (or norm slot, or head).
        radius: bound on the token norm of what enters it.
        lipschitz: bound on its own constant there (residual included).
        log10_total: log10 of the bound from the embeddings up to and including it.
    """

    name: str
    radius: float
    lipschitz: float
    log10_total: float


@dataclass(frozen=True)
class Certificate:
    """A proven bound on how fast the logits of a model can move with its embeddings.

    For any two inputs of the first block whose token norms are at most `radius`, the token norm of
    the logits' difference is at most `lipschitz` times that of the inputs' difference: any mask,
    any length, with or without KV cache, in eval mode, in real arithmetic on the stored weights.

    Attributes:
        lipschitz: the bound; inf where it exceeds 1.8e308 (see `log10_lipschitz`).
        log10_lipschitz: its base-10 logarithm, rounded up.
        radius: the ball it holds on, in token norm; every input made of tokens lies in it.
        norm: which norms it is between.
        source: `"weights"` (as they are) or `"caps"` (holds for every step of a run).
        layers: one LayerBound per sub-block.
        logit_difference: bound on how fast the difference of any two logits of a token moves, per unit
            of the inputs' token norm: what decides whether a prediction can change.
        d_in, d_out: widths of the embeddings and of the logits.
        attention_logit: all attention logits lie, up to a shift per row, within +- this.
        assumptions: what the number takes for granted.
        model: class and family it was computed for.
        weights: fingerprint of what it belongs to (see certificate/fingerprint.py), `verify` compares it.
        settings: what the model's config said about its function.
    """

    lipschitz: float
    log10_lipschitz: float
    radius: float
    norm: str
    source: str
    layers: tuple[LayerBound, ...]
    logit_difference: float
    d_in: int
    d_out: int
    attention_logit: float
    assumptions: tuple[str, ...]
    model: str
    weights: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    def verify(self, model: nn.Module) -> None:
        """Raise CertificateError unless this certificate was computed from this very model.

        It asks whose certificate this is, not whether the number is right; for that, certify again. Of a sharded
        model every process asks, together.
        """
        if has_shards(model):
            on_first_process(model, self.verify)
        else:
            check_belongs(self, model)

    def l2(self, tokens: int) -> float:
        """Bound between Euclidean norms over a whole sequence of `tokens` tokens: l2 -> l2.

        norm2(all logits' differences) <= l2 * norm2(all embeddings' differences), from the token norm by
        norm2 <= sqrt(tokens d) times it on one side and it <= norm2 / sqrt(d) on the other.
        """
        if tokens < 1:
            raise ConfigError(f"Certificate.l2(tokens={tokens}): must be at least 1.")
        ratio = root(div(mul(up(tokens), up(self.d_out)), up(self.d_in)))
        return to_float(mul(up(self.lipschitz), ratio))

    def smallest_entropy_lower(self, visible: int) -> float:
        """Proven lower bound, in nats, on every attention row's entropy over `visible` tokens."""
        return smallest_entropy_lower(self.attention_logit, visible)

    def to_json(self) -> str:
        """JSON text with a digest, which `from_json` checks. Infinities are written as strings."""
        body = _encode(asdict(self))
        return json.dumps({"format": FORMAT, "digest": _digest(body), "certificate": body}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Inverse of `to_json`. Raises CertificateError for any other text, or one changed since."""
        try:
            outer = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise CertificateError(
                f"not a certificate (not JSON: {error}); write a new one with certify(model)."
            ) from error
        if isinstance(outer, Mapping) and outer.get("format") == _WITHOUT_FINGERPRINT:
            raise CertificateError(
                "this certificate is from before certificates carried the fingerprint of their weights (format 1), so "
                "nothing tells which weights it belongs to: write a new one with certify(model).to_json()."
            )
        if not isinstance(outer, Mapping) or outer.get("format") != FORMAT:
            raise CertificateError(f"not a certificate of this version: its format is not {FORMAT!r}.")
        body = outer.get("certificate")
        if not isinstance(body, Mapping) or outer.get("digest") != _digest(body):
            raise CertificateError(
                "the certificate was truncated or edited: its digest does not match its content."
            )
        try:
            values = {k: _decode(v) for k, v in body.items()}
            values["layers"] = tuple(
                LayerBound(**{k: _decode(v) for k, v in row.items()}) for row in body["layers"]
            )
            values["assumptions"] = tuple(body["assumptions"])
            return cls(**values)
        except (TypeError, KeyError, AttributeError) as error:
            raise CertificateError(f"the certificate lacks or adds a field: {error}") from error

    def __str__(self) -> str:
        width = min(max([len(line.name) for line in self.layers] + [5]), 44)
        head = f"{'layer':<{width}}  {'radius in':>10}  {'constant':>10}  {'log10 total':>11}"
        rows = [
            f"{line.name[-width:]:<{width}}  {line.radius:>10.4g}  {line.lipschitz:>10.4g}  "
            f"{line.log10_total:>11.3f}"
            for line in self.layers
        ]
        value = f"{self.lipschitz:.6g}" if math.isfinite(self.lipschitz) else f"10^{self.log10_lipschitz:.2f}"
        last = f"Lipschitz <= {value} from {self.source}, on token norm <= {self.radius:.4g} ({self.model})"
        pairs = f"any difference of two logits moves at most {self.logit_difference:.6g} times as far"
        return "\n".join([head, "-" * len(head), *rows, "-" * len(head), last, pairs])


@sharded_too
def certify(
    model: nn.Module,
    source: str = "weights",
    *,
    check: bool = True,
    norms: Iterable[BlockNorms] | None = None,
) -> Certificate:
    """Prove an upper bound on Lip(embeddings -> logits), token norm to token norm.

    Args:
        model: a model of a known family, retrofitted or not, wrapped or not. Of a sharded one (FSDP2) every process
            calls this, together; the first gathers it in main memory, and all get its certificate.
        source: `"weights"` measures every norm (upwards, in float64); `"caps"` uses the caps alone.
        check: compare the graph with what was passed first, by a small forward of it. The longer comparison on random
            weights is remembered while nothing but weights changes.
        norms: for `"caps"`: what `block_norms(model)` gave for the weights as they are, if it was asked already. A
            certificate from caps is given only if every block is within its cap now.

    Raises:
        CertificateError: the graph does not reproduce the model, a layer has no cap, or a block is above its own.
        ConfigError: an unknown source.
        UnsupportedModelError: a module without a proven rule.
        NonFiniteError: a weight holds nan or inf.
    """
    if source not in SOURCES:
        raise ConfigError(f"certify(source={source!r}): choose 'weights' or 'caps'.")
    with torch.no_grad():
        graph = build(model)
        refuse_non_finite(graph.root)
        if check:
            check_graph(graph)
        proven = weight_norms(graph) if source == "weights" else cap_norms(graph)
        if source == "caps":
            check_within_caps(graph.root, norms)
        return replace(bound_of(graph, proven, source), weights=fingerprint(graph.root, source))


def bound_of(graph: Graph, norms: Norms, source: str, radius_upper: Decimal | None = None) -> Certificate:
    """The rules on given norms. `radius_upper`: of the embeddings, where they are not in memory any more."""
    # the bound is for the very ball that is stated, so the radius is rounded up to a float first
    start = to_float(radius_of(graph, source) if radius_upper is None else radius_upper)
    radius = up(start)
    total, logit, rows = ONE, Decimal(0), []
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
    difference = min(difference, mul(root(up(2 * d_out)), total))  # norm2(e_i - e_j) is sqrt(2)
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
        settings={**settings_of(graph.root), "function": function_of(graph)},
    )


def _width(nodes: Iterable[Any], side: str) -> int:
    """`d_in` of the first linear map, or `d_out` of the first in a reversed list."""
    return next(
        int(getattr(n, side)) for n in walk(nodes) if isinstance(n, (Linear, Attention)) and hasattr(n, side)
    )


def _assumptions(graph: Graph, source: str) -> tuple[str, ...]:
    lines = [
        "eval mode (no dropout), real arithmetic on the weights as stored; the bound itself is rounded up. What rounding of the "
        "forward pass adds is not in it (forward_rounding_upper bounds that)",
        "inputs of the first block have token norm at most the radius, as every sum of one row from each "
        "embedding table has (embeddings of another origin may not)",
        "the graph's forward was compared with the model's own on random weights; attention functions and "
        "activations of the libraries are what they were then",
    ]
    if graph.patches is not None:
        lines[1] = (
            "inputs of the first block have token norm at most the radius, as those of every image of the size that "
            "the model was built for have, whose pixel entries, after normalization, are at most "
            f"{graph.entry.pixel_max:g} in absolute value"
        )
    if source == "caps":
        lines.append(f"every block is within its cap times {CAP_SLACK}")
        caps = capped(
            graph.root
        )  # by what is constrained, not by name: peft moves a weight to its base_layer
        free = [n for n, p in graph.root.named_parameters() if n not in caps and p.requires_grad]
        if free:
            lines.append(
                f"biases, gains of kept norms and what else has no cap ({len(free)} tensors) as they are "
                "now: after a later step it needs a new certificate"
            )
    return tuple(lines)


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {k: _encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    return value


def _decode(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in ("inf", "-inf") else value


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
