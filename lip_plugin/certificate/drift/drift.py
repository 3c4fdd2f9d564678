"""drift(base, tuned): a proven bound on how far fine-tuning can have moved any logit.

The bound holds for every input of a ball in token norm. An attack can be run beside it, which finds
inputs that attain a part of the bound. Open this file for the public function and its result. The
rule of each node is in rules.py, and the attack in attack.py. The proofs are in docs/maths.md,
section 14.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor, nn

import lip_plugin.certificate.drift.attention_rule  # noqa: F401 (registers the rule of attention)
from lip_plugin.certificate.comparison.compare import check_graph
from lip_plugin.certificate.drift.compatible import refuse_unlike_settings
from lip_plugin.certificate.drift.rules import Sides, Streams, logit_step, rows_apart, step
from lip_plugin.certificate.graph.base import LinearNorms, ProvenNorms
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.graph.decimals import INF, ZERO, add, mul, root, to_float, up
from lip_plugin.certificate.graph.entry import Table
from lip_plugin.certificate.graph.nodes import Linear, Scale, Softcap
from lip_plugin.certificate.input_radius import radius_of
from lip_plugin.certificate.weight_norms import (
    matrix_norms,
    refuse_non_finite_weights,
    weight_norms,
)
from lip_plugin.distributed.gather import has_shards, sharded_too
from lip_plugin.errors import ConfigError, TrainerError, UnsupportedModelError
from lip_plugin.face import require_module
from lip_plugin.linalg.norms import row_rms_max_upper
from lip_plugin.tables import table as layout

# Relative rounding of a merged adapter weight W0 + s B A, and so of a difference with it, with some
# room. It is computed in float64, which rounds each entry by one unit.
_MERGED = Decimal("1e-15")


@dataclass(frozen=True)
class Drift:
    """How far apart the logits of two models of one structure can be, on the same input.

    If the embedding tables of the two models differ, an input is a sequence of token ids or an
    image, and each model looks up its own rows. What is proven, and attacked, is a little more. X
    enters the base and Y the tuned model, for any X and Y of token norm at most `radius` with a
    token norm of X - Y of at most `embeddings`.

    Attributes:
        logit_upper: proven bound on the difference of any single logit, at any token, for every
            input of the ball. It is inf where nothing finite is proven.
        logit_lower: the largest difference that an attack attained. It is 0 if no attack was asked
            for.
        norm_upper: proven bound on the token norm (RMS over the vocabulary) of the difference of
            the logits.
        radius: token norm of the ball of what enters the first block. It is the larger one of the
            two models' radii.
        embeddings: bound on the token norm of the difference of what enters the two first blocks.
            It is 0 if the tables are equal.
        layers: for every node its name, and a bound on the token norm of the difference behind it.
        assumptions: what the numbers take for granted.
        witness: the inputs (X, Y) that attain `logit_lower`, float64 [tokens, d] each.
    """

    logit_upper: float
    logit_lower: float
    norm_upper: float
    radius: float
    embeddings: float
    layers: tuple[tuple[str, float], ...]
    assumptions: tuple[str, ...]
    witness: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def summary(self) -> str:
        """The result as one line, in the manner of peft's print_trainable_parameters."""
        found = f" (attack found {self.logit_lower:.4g})" if self.logit_lower else ""
        return (
            f"drift: no logit moves by more than {self.logit_upper:.4g} "
            f"on token norm <= {self.radius:.4g}{found}"
        )

    def __str__(self) -> str:
        layers = layout(("layer", "apart by"), self.layers, ("<", "10.4g"), closed=True)
        return f"{layers}\n{self.summary}"


def drift(
    base: nn.Module,
    tuned: nn.Module | None = None,
    *,
    attack: bool = True,
    restarts: int = 8,
    steps: int = 60,
    seed: int = 0,
) -> Drift:
    """Bound how far any single logit of a tuned model can be from the base's, and attack the bound.

    The inputs are those of a ball in token norm.

    Args:
        base: a model of a known family. If `tuned` is left out, it has to carry peft adapters. The
            base is then this model with its adapters off, and the tuned model is this model as it
            is.
        tuned: a model of the same structure as `base`. Weights, biases, gains and tables may
            differ.
        attack: also look for a large difference, in float64.
        restarts: number of starts of the attack that are followed for `steps` steps. 0 leaves out
            the attack.
        steps: gradient steps of each of them.
        seed: seed of the attack's random starts.

    Returns:
        A Drift. It prints as a table, and its `summary` is one line.

    Raises:
        ConfigError: the models differ in structure, or `tuned` is left out and there are no
            adapters.
        TrainerError: adapters are merged into the base.
        UnsupportedModelError: a node has no rule, or one of two given models is sharded. A sharded
            model with adapters, and no `tuned`, is gathered. All processes then call this together.
        CertificateError: a graph does not reproduce its model.
        NonFiniteError: a weight holds nan or inf.
    """
    require_module(base, "drift")
    if tuned is not None:
        require_module(tuned, "drift")
    if restarts < 0 or steps < 1:
        raise ConfigError("drift: restarts must not be negative, and steps at least 1.")
    if tuned is not None and (has_shards(base) or has_shards(tuned)):
        raise UnsupportedModelError(
            "drift of two sharded models: load them unsharded, or ask before fully_shard."
        )
    return _drift(base, tuned, restarts if attack else 0, steps, seed)


@sharded_too
def _drift(base: nn.Module, tuned: nn.Module | None, restarts: int, steps: int, seed: int) -> Drift:
    with torch.no_grad():
        pair = _Pair.of(base, tuned)
        result = _bound(pair)
    if restarts == 0:
        return result
    from lip_plugin.certificate.drift.attack import largest_difference

    lower, witness = largest_difference(
        pair, result.radius, result.embeddings, restarts, steps, seed
    )
    return Drift(**{**vars(result), "logit_lower": lower, "witness": witness})


@dataclass(frozen=True)
class _Pair:
    """The graphs of the two models.

    `as_base` gives a context in which the base is what it stands for. With adapters both graphs
    share one model, and inside the context the adapters are off.
    """

    base: Graph
    tuned: Graph
    as_base: Any

    @classmethod
    def of(cls, base: nn.Module, tuned: nn.Module | None) -> _Pair:
        if tuned is None:
            _refuse_without_adapters(base)
            # The base's graph is built with adapters off. peft may train a copy beside a layer, and
            # the copy is another module than the layer.
            with _disabled(base):
                without = build(base)
            return cls(without, build(base), lambda: _disabled(base))
        return cls(build(base), build(tuned), nullcontext)

    def in_base(self) -> AbstractContextManager[None]:
        return self.as_base()

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits of the tuned model minus logits of the base, [n, tokens, vocabulary].

        Args:
            x: what enters the base's first block, [n, tokens, d].
            y: what enters the tuned model's first block, [n, tokens, d].
        """
        with self.in_base():
            base = self.base.body.run(x)
        return self.tuned.body.run(y) - base


# The layers that carry an adapter.
def _adapted(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(getattr(m, "base_layer", None), nn.Module)]


def _refuse_without_adapters(model: nn.Module) -> None:
    found = _adapted(model)
    if not found:
        raise ConfigError(
            f"drift({type(model).__name__}): there are no adapters on it, so there is nothing to "
            "compare it with. Call drift(base, tuned)."
        )
    if any(getattr(m, "merged", False) for m in found):
        raise TrainerError(
            "drift: adapters are merged into their base. Call model.unmerge_adapter() first."
        )


@contextmanager
def _disabled(model: nn.Module) -> Iterator[None]:
    """A context in which every adapter of the model is off.

    Only the flag that each layer's forward asks is changed. Active adapters, and whether weights
    take gradients, stay as they are.
    """
    found: list[Any] = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    before = [m._disable_adapters for m in found]
    try:
        for m in found:
            m._disable_adapters = True
        yield
    finally:
        for m, value in zip(found, before, strict=True):
            m._disable_adapters = value


# The proven part of a drift.
def _bound(pair: _Pair) -> Drift:
    for graph, context in ((pair.base, pair.in_base), (pair.tuned, nullcontext)):
        with context():
            refuse_non_finite_weights(graph.root)
            check_graph(graph)
    sides = _sides(pair)
    with pair.in_base():
        r_b = to_float(radius_of(pair.base, "weights"))
    r_t = to_float(radius_of(pair.tuned, "weights"))
    # The bound is proven for the very balls that the result states. So their sizes are rounded up
    # to floats first.
    start = up(to_float(min(_entry(pair, sides), add(up(r_b), up(r_t)))))
    refuse_unlike_settings(pair.base, pair.tuned)
    radius = max(r_b, r_t)
    at = Streams(up(radius), up(radius), start)
    # `logit` bounds the difference of a single output. A linear map gives such a bound, an equal
    # scale or a softcap behind it keeps one, and behind any other node there is none.
    logit, rows = INF, []
    for b, t in zip(pair.base.body.nodes, pair.tuned.body.nodes, strict=True):
        if isinstance(b, Linear):
            logit = logit_step(b, t, at, sides)  # type: ignore[arg-type]
        elif isinstance(b, Scale) and b.scale == getattr(t, "scale", None):
            logit = mul(up(abs(b.scale)), logit)
        elif not isinstance(b, Softcap):
            logit = INF
        at = step(b, t, at, sides)
        rows.append((b.name, to_float(at.delta)))
    width = next(n.d_out for n in reversed(pair.base.body.nodes) if isinstance(n, Linear))
    logit = min(logit, mul(root(up(width)), at.delta))
    return Drift(
        to_float(logit),
        0.0,
        to_float(at.delta),
        radius,
        to_float(start),
        tuple(rows),
        _assumptions(start),
    )


def _assumptions(start: Decimal) -> tuple[str, ...]:
    inputs = (
        "both models read the same embeddings, of token norm at most the radius "
        "(their tables are equal)"
        if start == 0
        else "both models are given the same token ids or pixels, "
        "and look up rows of their own tables, which differ"
    )
    return ("eval mode, real arithmetic on the weights as stored; any mask, any length", inputs)


# Proven norms of both models' matrices, and of their differences.
def _sides(pair: _Pair) -> Sides:
    with pair.in_base():
        base, of_base = weight_norms(pair.base), pair.base.linears()
    tuned, of_tuned = weight_norms(pair.tuned), pair.tuned.linears()
    names = [[name for _, name, _, _ in found] for found in (of_base, of_tuned)]
    if names[0] != names[1]:
        raise ConfigError(
            "drift: the two models have other linear maps. "
            "Compare a model with what it was tuned from."
        )
    apart, slack = [], {}
    for (role, name, module, w_b), (_, _, _, w_t) in zip(of_base, of_tuned, strict=True):
        if w_b.shape != w_t.shape:
            raise ConfigError(
                f"drift: {name} is {tuple(w_b.shape)} in the base "
                f"and {tuple(w_t.shape)} in the tuned model."
            )
        difference = w_t.detach().double() - w_b.detach().double().to(w_t.device)
        apart.append((role, name, module, difference))
        if bool(difference.any()):
            side = root(up(min(w_b.shape)))
            slack[name] = mul(_MERGED, side, add(base[name].sigma, tuned[name].sigma))
    return Sides(base, tuned, _widened(matrix_norms(pair.base, apart, pairs=False), slack))


def _widened(norms: ProvenNorms, slack: dict[str, Decimal]) -> ProvenNorms:
    """Norms of differences, each made larger by what computing the difference may have cost.

    Row norms are measured for those maps for which `matrix_norms` measures them.
    """
    out = ProvenNorms()
    for name, n in norms.items():
        more = slack.get(name, ZERO)
        whole = {k: add(v, more) for k, v in n.whole.items()}
        heads = {k: [add(v, more) for v in values] for k, values in n.heads.items()}
        out[name] = LinearNorms(add(n.sigma, more), add(n.row, more), whole, heads)
    return out


def _entry(pair: _Pair, sides: Sides) -> Decimal:
    """Bound on the token norm of the difference of what enters the two first blocks."""
    b, t = pair.base.entry, pair.tuned.entry
    if set(b.tables) != set(t.tables) or (b.patches is None) != (t.patches is None):
        raise ConfigError("drift: the two models have other embedding tables.")
    apart = {}
    for role, table in b.tables.items():
        mine, other = table.read(), t.tables[role].read()
        if mine.shape != other.shape:
            raise ConfigError(
                f"drift: {table.name} is {tuple(mine.shape)} in the base, "
                f"{tuple(other.shape)} in the tuned model."
            )
        apart[role] = rows_apart(other, mine)
    if b.token_map is not None and t.token_map is not None:
        sizes = [_largest_row(table) for table in (b.tables["token"], t.tables["token"])]
        at = Streams(sizes[0], sizes[1], apart["token"])
        apart["token"] = step(b.token_map, t.token_map, at, sides).delta
    if b.patches is not None and t.patches is not None:
        pixels = up(max(b.pixel_max, t.pixel_max))
        patch = step(b.patches, t.patches, Streams(pixels, pixels, ZERO), sides).delta
        apart["first"] = max(apart["first"], patch)
    total = add(*apart.values())
    if b.norm is None:
        return total
    before = _before_norm(pair)
    return step(b.norm, t.norm, Streams(*before, total), sides).delta


def _largest_row(table: Table) -> Decimal:
    """Largest RMS norm of a row, rounded up."""
    return up(float(row_rms_max_upper(table.read())))


def _before_norm(pair: _Pair) -> tuple[Decimal, Decimal]:
    """For each model, a bound on the token norm of what the norm behind the embeddings reads.

    It is a sum of rows. If some of them go through a map first, the bound is inf. The norm's own
    rule still bounds the difference then, because a norm's output is bounded.
    """
    entries = (pair.base.entry, pair.tuned.entry)
    mapped = any(e.token_map is not None or e.patches is not None for e in entries)
    sizes = [INF if mapped else add(*(_largest_row(t) for t in e.tables.values())) for e in entries]
    return sizes[0], sizes[1]
