"""Attacks that look for a lower bound of a Lipschitz constant, of a model or of one node of it.

`falsify(model)` attacks the certificate of a model. `falsify_node` attacks the rule of a single
graph node. Both return the inputs that attain what they found, so anyone can check them. A lower
bound above the certificate would prove the certificate wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.certificate.attack.ascent import (
    Ascended,
    Starts,
    Witness,
    ascend,
    grow,
    in_ball,
    secant,
    witness_of,
)
from lip_plugin.certificate.attack.starts import d_in_of, structured
from lip_plugin.certificate.comparison.compare import check_graph
from lip_plugin.certificate.graph.attention import Attention
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.graph.containers import walk
from lip_plugin.certificate.graph.decimals import to_float
from lip_plugin.certificate.graph.nodes import Linear
from lip_plugin.certificate.input_radius import radius_of
from lip_plugin.certificate.weight_norms import refuse_non_finite_weights
from lip_plugin.distributed.gather import sharded_too
from lip_plugin.errors import CertificateError, ConfigError
from lip_plugin.progress import progress

# Default lengths of the sequence. The first one gets all restarts. An odd length suits attention
# best. Its tokens can then come in pairs of opposite values, with one more token whose query reads
# them.
_LENGTHS = (17, 1, 2, 3, 48)
_BYTES = 2**30  # memory for the activations that an ascent keeps at a time


@dataclass(frozen=True)
class Falsification:
    """What an attack on a model found.

    Attributes:
        lower_bound: the witness's secant slope, token norm to token norm, with rounding taken off.
            The witness attains it, so the true Lipschitz constant is not smaller.
        witness: the two inputs.
        radius: token norm within which both inputs stay.
        start: the kind of start that won (see `lip_plugin.certificate.attack.starts`).
        tokens: length of the winning sequence.
    """

    lower_bound: float
    witness: Witness
    radius: float
    start: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class NodeFalsification:
    """What an attack on one node found. Its slope and its output size are both attained.

    Attributes:
        lipschitz_lower: the witness's secant slope, token norm to token norm.
        radius_lower: largest token norm of an output that was found.
        radius: token norm of the ball that was searched.
        witness: the two inputs of the secant.
        largest_input: the input [tokens, d] whose output has token norm `radius_lower`.
        start: the kind of start that won.
    """

    lipschitz_lower: float
    radius_lower: float
    radius: float
    witness: Witness
    largest_input: Tensor
    start: str


@sharded_too
def falsify(
    model: nn.Module,
    restarts: int = 8,
    steps: int = 100,
    *,
    tokens: int | Sequence[int] | None = None,
    lr: float = 0.3,
    seed: int = 0,
    progress: bool = False,
) -> Falsification:
    """Find a large secant slope between two inputs of the certificate's ball, in token norms.

    The secant slope norm(F(e + h v) - F(e - h v)) / norm(2 h v) is a lower bound of the Lipschitz
    constant, whatever h is. It is ascended in float64 over inputs e and directions v, both
    [tokens, d]. Many structured and random starts are followed for a few steps. The most promising
    ones, and the best of each kind, are then followed for `steps` steps, and the best of those once
    more with a smaller rate. Both ends stay in the ball that the certificate is about.

    Args:
        model: a model of a known family.
        restarts: number of starts that are followed to the end. More than four times as many are
            tried for a few steps.
        steps: ascent steps of each start that is followed.
        tokens: length of the sequence, or several lengths. The default is 17, and with fewer
            restarts and steps also 1, 2, 3 and 48. A length beyond the model's positions is cut to
            what they allow.
        lr: first rate of Adam in units of the radius. It falls along a cosine.
        seed: seed of all random starts.
        progress: show a progress bar, where tqdm is installed.

    Returns:
        The slope, and the two inputs that attain it.

    Raises:
        ConfigError: restarts, steps or tokens are below 1.
        NonFiniteError: a weight holds nan or inf.
        CertificateError: the graph does not reproduce the model, all embeddings are zero, or the
            embeddings are too large for floats.
    """
    lengths = _lengths(tokens)
    if min(restarts, steps, *lengths) < 1:
        raise ConfigError("falsify: restarts, steps and tokens must be at least 1.")
    with torch.no_grad():
        graph = build(model)
        refuse_non_finite_weights(graph.root)
        check_graph(graph)
        radius = to_float(radius_of(graph, "weights"))
        if radius == 0:
            raise CertificateError("All embeddings are zero: there are no two inputs to compare.")
        if not math.isfinite(radius):
            raise CertificateError(
                "The embeddings exceed floats: no pair of inputs could be computed."
            )
        longest = _longest(graph)
    lengths = tuple(dict.fromkeys(min(n, longest) for n in lengths))
    budget = _Budget(restarts, steps, lr, seed, progress)
    slope, witness, name = _search(graph.body, d_in_of(graph.body), radius, lengths, budget)
    return Falsification(slope, witness, radius, name, len(witness.embeddings))


def attained(graph: Graph, witness: Witness) -> float:
    """Secant slope of a witness on a graph, token norm to token norm, with rounding taken off.

    Use it to check a witness again, for example after it was saved.
    """
    return secant(graph.body, witness)


def falsify_node(
    node: Any,
    radius: float,
    d: int | None = None,
    tokens: int | Sequence[int] = 17,
    *,
    restarts: int = 8,
    steps: int = 60,
    lr: float = 0.3,
    seed: int = 0,
) -> NodeFalsification:
    """Attack one graph node, chain, branch or gate alone, on a ball of token norm `radius`.

    It finds a large secant slope and a large output, each attained by an input that is returned.
    Both are lower bounds of what `node.bound(radius, norms)` proves from above.

    Args:
        node: anything with a method `run`.
        radius: token norm of the ball.
        d: width of the node's input. None reads it from the first linear map inside.
        tokens, restarts, steps, lr, seed: as in `falsify`.

    Returns:
        Both lower bounds and the inputs that attain them.

    Raises:
        ConfigError: the radius is not positive and finite, or a count is below 1.
        ValueError: d is None and there is no linear map inside.
    """
    lengths = _lengths(tokens)
    if min(restarts, steps, *lengths) < 1 or not 0 < radius < math.inf:
        raise ConfigError(
            "falsify_node: a positive finite radius, and counts of at least 1, please."
        )
    d = d_in_of(node) if d is None else d
    budget = _Budget(restarts, steps, lr, seed, False)
    slope, witness, name = _search(node, d, radius, lengths, budget)
    sizes, at = _largest(node, d, radius, lengths, budget, witness)
    return NodeFalsification(slope, sizes, radius, witness, at, name)


# The lengths of sequences that an attack tries.
def _lengths(tokens: int | Sequence[int] | None) -> tuple[int, ...]:
    if tokens is None:
        return _LENGTHS
    return (tokens,) if isinstance(tokens, int) else tuple(tokens)


def _longest(graph: Graph) -> int:
    """The largest number of tokens for which the model has positions."""
    config = getattr(graph.root, "config", None)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "block_size")]
    return min((int(n) for n in (*limits, graph.entry.longest) if n), default=1 << 30)


@dataclass(frozen=True)
class _Budget:  # how much work an attack may do
    restarts: int
    steps: int
    lr: float
    seed: int
    progress: bool


def _search(
    node: Any, d: int, radius: float, lengths: tuple[int, ...], budget: _Budget
) -> tuple[float, Witness, str]:
    """Try many starts, follow the promising ones, and refine the best.

    Returns:
        The slope, the witness that attains it, and the kind of start.
    """
    total = ((len(lengths) + 1) // 2 + max(1, budget.restarts // 4)) * (budget.steps + 1)
    with progress(total, "falsify", show=budget.progress) as bar:
        return _followed(node, d, radius, lengths, budget, bar.update)


# The work of `_search`, with a progress bar's `tick`.
def _followed(
    node: Any,
    d: int,
    radius: float,
    lengths: tuple[int, ...],
    budget: _Budget,
    tick: Callable[[], Any],
) -> tuple[float, Witness, str]:
    device = _device(node)
    ascended: list[Ascended] = []
    for i, tokens in enumerate(lengths):
        restarts = budget.restarts if i == 0 else max(1, budget.restarts // 4)
        steps = budget.steps if i == 0 else max(1, budget.steps // 2)
        count = 4 * restarts + 8
        starts = structured(
            node.run, node, count, tokens, d, radius, seed=budget.seed + 1000 * i, device=device
        )
        chunk = _chunk(node, tokens)
        short = max(2, steps // 8)
        screened = ascend(node.run, starts, radius, short, budget.lr, warm=short // 2, chunk=chunk)
        rows = _survivors(screened, restarts)
        ascended.append(
            ascend(
                node.run,
                screened.starts.take(rows),
                radius,
                steps,
                budget.lr,
                chunk=chunk,
                tick=tick,
            )
        )
    tops = [(float(a.slopes[row]), a, row) for a in ascended for row in a.best(2)]
    tops = sorted(tops, key=lambda top: -top[0])[: max(1, budget.restarts // 4)]
    best: tuple[float, Witness, str] | None = None
    for _, a, row in tops:
        fine = _refine(node, a.starts.take([row]), radius, budget, tick)
        for found in (a.starts.take([row]), fine):
            slope, witness = witness_of(node, found, 0, radius)
            if best is None or slope > best[0]:
                best = (slope, witness, found.names[0])
    assert best is not None
    return best


def _survivors(screened: Ascended, count: int) -> list[int]:
    """Choose `count` rows of the starts that were tried.

    Half of the places go to the largest slopes. The other half goes to the best start of each kind,
    so that a kind that rises late is not lost. Places that are left go by slope again.
    """
    ranked, kinds, seen = screened.best(len(screened.starts)), [], set()
    for row in ranked:
        if screened.starts.names[row] not in seen:
            seen.add(screened.starts.names[row])
            kinds.append(row)
    order = ranked[: (count + 1) // 2] + kinds + ranked
    return list(dict.fromkeys(order))[:count]


def _refine(
    node: Any, start: Starts, radius: float, budget: _Budget, tick: Callable[[], Any]
) -> Starts:
    """Follow a start once more at a smaller rate, together with two disturbed copies of it."""
    generator = torch.Generator().manual_seed(budget.seed + 77)
    copies = start.take([0, 0, 0])
    noise = torch.randn(copies.inputs.shape, generator=generator, dtype=torch.float64).to(
        copies.inputs.device
    )
    sizes = torch.tensor([0.0, 0.05, 0.3], dtype=torch.float64, device=noise.device)[:, None, None]
    copies.inputs = in_ball(copies.inputs, 1.0) + sizes * noise
    chunk = _chunk(node, start.inputs.shape[1])
    found = ascend(node.run, copies, radius, budget.steps, 0.3 * budget.lr, chunk=chunk, tick=tick)
    return found.starts.take(found.best(1))


def _largest(
    node: Any, d: int, radius: float, lengths: tuple[int, ...], budget: _Budget, witness: Witness
) -> tuple[float, Tensor]:
    """Find a large output, from structured starts of every length and from the witness's inputs.

    Returns:
        The token norm of the output, and the input [tokens, d] that attains it.
    """
    device, best = _device(node), (-1.0, witness.embeddings)
    batches = [witness.embeddings[None] / radius]
    for tokens in lengths:
        starts = structured(
            node.run,
            node,
            2 * budget.restarts + 4,
            tokens,
            d,
            radius,
            seed=budget.seed,
            device=device,
        )
        batches.append(torch.cat([starts.inputs, -starts.inputs]))
    for batch in batches:
        for part in batch.split(_chunk(node, batch.shape[1])):
            sizes, inputs = grow(node.run, part, radius, budget.steps, budget.lr)
            row = int(sizes.argmax())
            best = max(best, (float(sizes[row]), inputs[row]), key=lambda found: found[0])
    return best


# Where the first linear map inside has its weight; the CPU if there is none.
def _device(node: Any) -> torch.device:
    for inner in walk([node]):
        linear = inner.q.linear if isinstance(inner, Attention) else inner
        if isinstance(linear, Linear):
            return linear.weight().device
    return torch.device("cpu")


def _chunk(node: Any, tokens: int) -> int:
    """How many starts fit into `_BYTES`.

    Each start has two ends, and autograd keeps about three copies of every output in float64.
    """
    floats = 0
    for inner in walk([node]):
        if isinstance(inner, Attention):
            floats += 3 * inner.q.heads * (inner.d_head + tokens)
        floats += getattr(inner, "d_out", 0)
    return max(1, _BYTES // (8 * 2 * 3 * max(1, floats) * tokens))
