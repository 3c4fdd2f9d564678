"""The starts of an attack: inputs and directions that are built from the weights, and random ones.

A start is what enters the first block, [tokens, d]. It is built from graph nodes and shapes alone,
without a tokenizer or an embedding. So the same code serves a whole graph, a single node of it, and
families that are added later. Open this file to see or extend the kinds of places that an attack
tries first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.attack.ascent import Starts, in_ball, steepest
from lip_plugin.certificate.graph.attention import Attention, HeadRows
from lip_plugin.certificate.graph.containers import Residual, walk
from lip_plugin.certificate.graph.nodes import Gate, Norm

# Sizes of small balls, as shares of the radius. Kept norms are steep on balls as small as these.
_TINY = (1e-3, 1e-8, 1e-30)
# No SVD is taken of wider matrices than this. Power iteration has to find their steep directions.
_WIDE = 2048


def d_in_of(node: Any) -> int:
    """Width of what enters a node, read from the first linear map inside it.

    Raises:
        ValueError: there is no linear map inside, as in an activation or a constant.
    """
    for inner in walk([node]):
        if hasattr(inner, "d_in"):
            return int(inner.d_in)
    raise ValueError(
        f"{getattr(node, 'name', node)}: no linear map inside tells its width; pass d."
    )


@dataclass
class _Space:
    """What every builder of starts needs.

    Attributes:
        run: the map that is attacked.
        nodes: all nodes inside it.
        tokens, d: shape of an input.
        radius: token norm of the ball.
        generator: source of all random numbers.
        device: where the starts are made.
    """

    run: Callable[[Tensor], Tensor]
    nodes: list[Any]
    tokens: int
    d: int
    radius: float
    generator: torch.Generator
    device: torch.device

    def random(self) -> Tensor:
        """Gaussian entries [tokens, d] of standard deviation 2.

        The RMS norms are around 2, so tokens lie on the ball's boundary once they are clipped to 1.
        """
        x = torch.randn(self.tokens, self.d, generator=self.generator, dtype=torch.float64)
        return 2 * x.to(self.device)

    def signs(self) -> Tensor:
        """+1 and -1 by turns, [tokens, 1]."""
        return (
            torch.where(torch.arange(self.tokens) % 2 == 0, 1.0, -1.0)
            .double()[:, None]
            .to(self.device)
        )


@dataclass
class _Start:  # one row of `Starts`; `center` None stands for zero
    name: str
    inputs: Tensor
    directions: Tensor
    scale: float = 1.0
    center: Tensor | None = None


def structured(
    run: Callable[[Tensor], Tensor],
    node: Any,
    count: int,
    tokens: int,
    d: int,
    radius: float,
    *,
    seed: int,
    device: torch.device,
) -> Starts:
    """Build `count` starts of several kinds.

    The kinds take turns, and the best guess of each kind comes first. The kinds are:

    - the steepest direction of the map linearized at zero, and at a random input;
    - random inputs and directions;
    - one head with opposite values, largest heads first;
    - small balls around zero (more of them where norms are kept);
    - random tokens of opposite values;
    - inputs along the rows of a gate;
    - the same token everywhere;
    - the first token alone;
    - small balls around inputs that a kept norm would see as zero.

    Args:
        run: the map that is attacked.
        node: the graph node of that map.
        count: number of starts.
        tokens, d: shape of an input.
        radius: token norm of the ball.
        seed: seed of the random numbers.
        device: where the starts are made.
    """
    generator = torch.Generator().manual_seed(seed)
    space = _Space(run, list(walk([node])), tokens, d, radius, generator, device)
    builders = [
        _linearized(space),
        _random(space),
        _one_head(space),
        _near_zero(space),
        _opposite(space),
    ]
    builders += [
        _gate_rows(space),
        _same_token(space),
        _first_token(space),
        _cancelled(space, node),
    ]
    found: list[_Start] = []
    while len(found) < count:
        for builder in list(builders):
            start = next(builder, None)
            if start is None:
                builders.remove(builder)
            else:
                found.append(start)
    found = found[:count]
    zero = torch.zeros(tokens, d, dtype=torch.float64, device=device)
    return Starts(
        torch.stack([zero if s.center is None else s.center for s in found]),
        torch.stack([s.inputs for s in found]),
        torch.stack([s.directions for s in found]),
        torch.tensor([s.scale for s in found], dtype=torch.float64, device=device),
        [s.name for s in found],
    )


def _random(space: _Space) -> Iterator[_Start]:
    while True:
        yield _Start("random", space.random(), space.random())


def _opposite(space: _Space) -> Iterator[_Start]:
    while True:
        x = space.signs() * space.random()[:1]
        x[-1] = space.random()[0]  # the last token's query reads the others
        yield _Start("opposite values", x, space.random())


def _same_token(space: _Space) -> Iterator[_Start]:
    for _ in range(2):
        token, v = space.random()[:1], space.random()[:1]
        yield _Start("same token", token.expand(space.tokens, -1), v.expand(space.tokens, -1))


def _first_token(space: _Space) -> Iterator[_Start]:
    if space.tokens > 1:
        x, v = space.random(), space.random()
        x[1:] *= 1e-3
        v[1:] *= 1e-3
        yield _Start("first token", x, v)


def _near_zero(space: _Space) -> Iterator[_Start]:
    """Small balls around zero.

    One size is enough for smooth maps. Kept norms are steep on the scale of their eps, so several
    sizes are tried there.
    """
    scales = _TINY if any(isinstance(n, Norm) for n in space.nodes) else _TINY[:1]
    for scale in scales:
        yield _Start("near zero", space.random(), space.random(), scale)


def _linearized(space: _Space) -> Iterator[_Start]:
    """The input that the linearized map stretches most, moved along itself.

    The map is linearized at zero first, and then at a random input.
    """
    for share in (0.0, 1.0):
        e = share * in_ball(space.random(), space.radius)
        v = jacobian_direction(space.run, e, space.random())
        if bool(v.isfinite().all()) and bool(v.any()):
            name = "linearized at zero" if share == 0 else "linearized"
            yield _Start(name, 2 * v, v)
            if share == 0:
                yield _Start(name, v, v, 1e-3)


def jacobian_direction(
    run: Callable[[Tensor], Tensor], e: Tensor, v: Tensor, rounds: int = 12, exact: int = 256
) -> Tensor:
    """Steepest direction of the exact Jacobian at one input, for the last token's output.

    Norms are RMS norms of tokens. A single token of at most `exact` entries is solved by an SVD.
    Otherwise the direction is found by power iteration in the token norm, with exact products of
    the Jacobian.

    Args:
        run: the map.
        e: the input [tokens, d].
        v: first direction of the power iteration [tokens, d].
        rounds: number of its steps.
        exact: largest width that is solved by an SVD.

    Returns:
        The direction [tokens, d]. Each token has RMS norm 1.
    """
    if e.shape[0] == 1 and e.shape[1] <= exact:
        basis = torch.eye(e.shape[1], dtype=e.dtype, device=e.device)[:, None]
        columns = _products(run, e.expand(len(basis), -1, -1), basis)[0]  # [d, d_out]
        if not bool(columns.isfinite().all()):
            return steepest(v)
        return steepest(torch.linalg.svd(columns.T, full_matrices=False).Vh[:1])
    v = steepest(v)
    for _ in range(rounds):
        gradient = _products(run, e[None], v[None])[1][0]
        seen = gradient.abs().amax(-1, keepdim=True) > 0
        v = torch.where(seen, steepest(gradient), v)
    return v


@torch.enable_grad()
def _products(run: Callable[[Tensor], Tensor], e: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Products of the Jacobian J of the last token's output, at each input of a batch.

    The derivative of the map w -> J^T w in the direction v is J v. So two reverse passes give it.

    Returns:
        J v [n, d_out], and J^T J v [n, tokens, d].
    """
    x = e.detach().requires_grad_(True)
    out = run(x)[:, -1]
    w = torch.zeros_like(out, requires_grad=True)
    (pulled,) = torch.autograd.grad(out, x, w, create_graph=True)
    (moved,) = torch.autograd.grad(pulled, w, v, retain_graph=True)
    (back,) = torch.autograd.grad(out, x, moved)
    return moved, back


def _cancelled(space: _Space, node: Any) -> Iterator[_Start]:
    """Small balls around inputs that a kept norm sees as zero, where that norm is steepest.

    The norms in front of the blocks and the last norm are tried. The norm of the first block is
    left out: it reads the input itself, so the balls around zero serve it.
    """
    nodes = getattr(node, "nodes", [])
    for i, inner in enumerate(nodes):
        norm = inner.branch.nodes[0] if isinstance(inner, Residual) else inner
        if not isinstance(norm, Norm) or (i == 0 and isinstance(inner, Residual)):
            continue
        e = torch.zeros(1, space.tokens, space.d, dtype=torch.float64, device=space.device)
        with torch.no_grad():
            # u(e) is the sum that enters the norm. The step e <- e - u(e) / 2 moves it towards
            # zero.
            for _ in range(40):
                u = e
                for before in nodes[:i]:
                    u = before.run(u)
                if u.shape != e.shape:
                    return
                e = in_ball(e - u / 2, space.radius)
        if bool(e.isfinite().all()) and bool(e.any()):
            for scale in (1e-3, 1e-6):
                yield _Start("cancelled", space.random(), space.random(), scale, e[0])


def _one_head(space: _Space) -> Iterator[_Start]:
    """Opposite values for one head at a time, built from the singular directions of its q, k and v.

    The tokens carry the direction that keys and values (or values alone) read most, with
    alternating signs. The last token carries the direction that the query reads most.
    """
    for q, k, v in _heads(space):
        if min(float(w.norm()) for w in (q, k, v)) == 0 or q.shape[1] != space.d:
            continue
        for reads in ((k, v), (v,)):
            w = torch.linalg.svd(torch.cat([m / m.norm() for m in reads]), full_matrices=False).Vh[
                0
            ]
            asks = torch.linalg.svd(q - (q @ w)[:, None] * w, full_matrices=False).Vh[0]
            x = space.signs() * w
            # an even number of tokens stands before it, so that no sign prevails
            x[len(x) - 2 + len(x) % 2 :] = asks
            direction = w.expand(space.tokens, -1) + 0.1 * space.random() / space.d**0.5
            yield _Start("one head", x * space.d**0.5, direction)


def _heads(space: _Space) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The rows of q, k and v of every head, each [d_head, d] in float64.

    Heads with the largest product of the three Frobenius norms come first.
    """
    found: list[tuple[float, int, int, Attention]] = []
    for node in space.nodes:
        if isinstance(node, Attention) and node.q.linear.d_in <= _WIDE:
            sizes = [_rows(p).norm(dim=(-2, -1)).log() for p in (node.q, node.k, node.v)]
            group = node.q.heads // node.k.heads
            for h in range(node.q.heads):
                size = float(sizes[0][h] + sizes[1][h // group] + sizes[2][h // group])
                found.append((size, h, h // group, node))
    for _, h, shared, node in sorted(found, key=lambda entry: -entry[0]):
        yield (
            _rows(node.q)[h].double(),
            _rows(node.k)[shared].double(),
            _rows(node.v)[shared].double(),
        )


def _rows(p: HeadRows) -> Tensor:
    """The weight of one projection as stored, [heads, d_head, d]."""
    return p.linear.weight().detach()[p.start : p.stop].unflatten(0, (p.heads, -1))


def _gate_rows(space: _Space) -> Iterator[_Start]:
    """Inputs along a row of the gate's map and the same row of the up map, alike for all tokens.

    The rows with the two largest products of norms are used, with both signs of the up row.
    """
    for node in space.nodes:
        if not isinstance(node, Gate) or node.gate.d_in != space.d:
            continue
        g, u = node.gate.weight().detach().double(), node.up.weight().detach().double()
        for row in (g.norm(dim=-1) * u.norm(dim=-1)).topk(min(2, len(g))).indices.tolist():
            parts = [w[row] / w[row].norm().clamp_min(1e-300) for w in (g, u)]
            for sign in (1.0, -1.0):
                x = steepest((parts[0] + sign * parts[1])[None]).expand(space.tokens, -1)
                yield _Start("gate row", 2 * x, x + 0.1 * space.random())
