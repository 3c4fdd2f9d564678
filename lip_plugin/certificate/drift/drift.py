"""drift(base, tuned): how far fine-tuning can have moved any logit, on any input of the ball. Proven, and attacked beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor, nn

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
from lip_plugin.linalg.norms import row_rms_max_upper

# A merged weight W0 + s B A is computed in float64: one unit of each entry of it, and so of the difference, with room.
_MERGED = Decimal("1e-15")


@dataclass(frozen=True)
class Drift:
    """How far apart the logits of two models of one structure can be, on the same input.

    Attributes:
        logit_upper: proven bound on the difference of any single logit, of any token, for every input of the ball; inf
            where nothing finite is proven.
        logit_lower: the largest difference that an attack attained; 0 if it was not asked for.
        norm_upper: proven bound on the token norm (RMS over the vocabulary) of the difference of the logits.
        radius: the ball: token norm of what enters the first block, the larger one of the two models'.
        embeddings: bound on the token norm by which what enters the first blocks differs (0 where the tables are equal).
            The inputs are then token ids, and each model looks up its own rows. What is proven, and attacked, is a little
            more: any X, Y of token norm at most `radius`, and X - Y at most `embeddings`, X into the base, Y into the tuned.
        layers: (name, token norm of the streams' difference behind it) of every node.
        assumptions: what the numbers take for granted.
        witness: the (X, Y) that attain `logit_lower`, float64 [tokens, d] each.
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
        """One line, as print_trainable_parameters gives."""
        found = f" (attack found {self.logit_lower:.4g})" if self.logit_lower else ""
        return f"drift: no logit moves by more than {self.logit_upper:.4g} on token norm <= {self.radius:.4g}{found}"

    def __str__(self) -> str:
        width = min(max([len(name) for name, _ in self.layers] + [5]), 44)
        head = f"{'layer':<{width}}  {'apart by':>10}"
        rows = [f"{name[-width:]:<{width}}  {delta:>10.4g}" for name, delta in self.layers]
        return "\n".join([head, "-" * len(head), *rows, "-" * len(head), self.summary])


def drift(
    base: nn.Module,
    tuned: nn.Module | None = None,
    *,
    attack: bool = True,
    restarts: int = 8,
    steps: int = 60,
    seed: int = 0,
) -> Drift:
    """Bound how far any logit differs between a model and what it was tuned to, and attack the bound.

    Args:
        base: a model of a known family; or, with `tuned` left out, one that carries peft adapters: the base is then the same
            model without them, and the tuned one the model as it is.
        tuned: of the same structure as `base`; weights, biases, gains and tables may differ.
        attack: also look for a large difference, in float64.
        restarts: starts of the attack that are followed for `steps` gradient steps; 0 leaves it out.
        seed: of its random starts.

    Returns:
        A Drift, which prints as a table; its `summary` is one line.

    Raises:
        ConfigError: models of different structure, or no adapters.
        TrainerError: adapters are merged into the base.
        UnsupportedModelError: a node without a rule, or two models of which one is sharded (with adapters, and no `tuned`,
            a sharded model is gathered: every process calls this, together).
        CertificateError: a graph does not reproduce its model. NonFiniteError: a weight holds nan or inf.
    """
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
    """Two graphs, and the context in which each is what it stands for."""

    base: Graph
    tuned: Graph
    as_base: Any

    @classmethod
    def of(cls, base: nn.Module, tuned: nn.Module | None) -> _Pair:
        if tuned is None:
            _refuse_without_adapters(base)
            with _disabled(
                base
            ):  # a copy that peft trains beside a layer is another module than the layer
                without = build(base)
            return cls(without, build(base), lambda: _disabled(base))
        return cls(build(base), build(tuned), nullcontext)

    def in_base(self) -> AbstractContextManager[None]:
        return self.as_base()

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        """tuned - base of both graphs' logits, for what enters their first blocks, y and x [n, tokens, d]."""
        with self.in_base():
            base = self.base.body.run(x)
        return self.tuned.body.run(y) - base


def _adapted(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(getattr(m, "base_layer", None), nn.Module)]


def _refuse_without_adapters(model: nn.Module) -> None:
    found = _adapted(model)
    if not found:
        raise ConfigError(
            f"drift({type(model).__name__}): there are no adapters on it, so there is nothing to compare it with. Call "
            "drift(base, tuned)."
        )
    if any(getattr(m, "merged", False) for m in found):
        raise TrainerError(
            "drift: adapters are merged into their base. Call model.unmerge_adapter() first."
        )


@contextmanager
def _disabled(model: nn.Module) -> Iterator[None]:
    """Inside, every adapter is off; gradients' flags and active adapters are not touched."""
    found: list[Any] = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    before = [m._disable_adapters for m in found]
    try:
        for m in found:
            m._disable_adapters = True
        yield
    finally:
        for m, value in zip(found, before, strict=True):
            m._disable_adapters = value


def _bound(pair: _Pair) -> Drift:
    for graph, context in ((pair.base, pair.in_base), (pair.tuned, nullcontext)):
        with context():
            refuse_non_finite_weights(graph.root)
            check_graph(graph)
    sides = _sides(pair)
    with pair.in_base():
        r_b = to_float(radius_of(pair.base, "weights"))
    r_t = to_float(radius_of(pair.tuned, "weights"))
    # the bound is for the very balls that are stated, so both are rounded up to floats first
    start = up(to_float(min(_entry(pair, sides), add(up(r_b), up(r_t)))))
    refuse_unlike_settings(pair.base, pair.tuned)
    radius = max(r_b, r_t)
    at = Streams(up(radius), up(radius), start)
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
        "both models read the same embeddings, of token norm at most the radius (their tables are equal)"
        if start == 0
        else "both models are given the same token ids or pixels, and look up rows of their own tables, which differ"
    )
    return ("eval mode, real arithmetic on the weights as stored; any mask, any length", inputs)


def _sides(pair: _Pair) -> Sides:
    with pair.in_base():
        base, of_base = weight_norms(pair.base), pair.base.linears()
    tuned, of_tuned = weight_norms(pair.tuned), pair.tuned.linears()
    names = [[name for _, name, _, _ in found] for found in (of_base, of_tuned)]
    if names[0] != names[1]:
        raise ConfigError(
            "drift: the two models have other linear maps. Compare a model with what it was tuned from."
        )
    apart, slack = [], {}
    for (role, name, module, w_b), (_, _, _, w_t) in zip(of_base, of_tuned, strict=True):
        if w_b.shape != w_t.shape:
            raise ConfigError(
                f"drift: {name} is {tuple(w_b.shape)} in the base and {tuple(w_t.shape)} in the tuned model."
            )
        difference = w_t.detach().double() - w_b.detach().double().to(w_t.device)
        apart.append((role, name, module, difference))
        if bool(difference.any()):
            side = root(up(min(w_b.shape)))
            slack[name] = mul(_MERGED, side, add(base[name].sigma, tuned[name].sigma))
    return Sides(base, tuned, _widened(matrix_norms(pair.base, apart, pairs=False), slack))


def _widened(norms: ProvenNorms, slack: dict[str, Decimal]) -> ProvenNorms:
    """ProvenNorms of differences, each larger by what computing it may have cost; rows as measured by `matrix_norms`."""
    out = ProvenNorms()
    for name, n in norms.items():
        more = slack.get(name, ZERO)
        whole = {k: add(v, more) for k, v in n.whole.items()}
        heads = {k: [add(v, more) for v in values] for k, values in n.heads.items()}
        out[name] = LinearNorms(add(n.sigma, more), add(n.row, more), whole, heads)
    return out


def _entry(pair: _Pair, sides: Sides) -> Decimal:
    """Token norm of the difference of what enters the first blocks."""
    b, t = pair.base.entry, pair.tuned.entry
    if set(b.tables) != set(t.tables) or (b.patches is None) != (t.patches is None):
        raise ConfigError("drift: the two models have other embedding tables.")
    apart = {}
    for role, table in b.tables.items():
        mine, other = table.read(), t.tables[role].read()
        if mine.shape != other.shape:
            raise ConfigError(
                f"drift: {table.name} is {tuple(mine.shape)} in the base, {tuple(other.shape)} in the tuned model."
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
    """Token norms of the sums of rows that an entry norm reads; inf where they go through a map first (the norm bounds them)."""
    entries = (pair.base.entry, pair.tuned.entry)
    mapped = any(e.token_map is not None or e.patches is not None for e in entries)
    sizes = [INF if mapped else add(*(_largest_row(t) for t in e.tables.values())) for e in entries]
    return sizes[0], sizes[1]
