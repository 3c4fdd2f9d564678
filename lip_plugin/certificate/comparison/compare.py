"""`check_graph`: does the object that the user passed compute what its graph computes?

This is asked before every number. The object itself is run, with its outermost wrapper, and with
its hooks, patches, adapters and attributes as they are now. Only its parameters are swapped for
float64 values while it runs.

There are two runs. One is on random values, because small weights would hide a difference: the
output maps of a fresh model are zero, for example. A structure that passed this run is remembered,
and the run is not repeated for it (see structure.py). The other run is on the object's own values,
each time.

In a run, every layer reads an input of its own, of the size that is natural for it. So a mistake of
one layer cannot vanish in what surrounds it. What one layer hands to the next is compared as well.

The comparison finds differences of structure and of state. It cannot find a forward that was made
to deceive, by less than `TOLERANCE` or on other inputs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lip_plugin.certificate.comparison.difference import TOLERANCE, relative_difference
from lip_plugin.certificate.comparison.float64_run import (
    evaluating,
    exact_values,
    float64_parameters,
    own_values,
    random_values,
)
from lip_plugin.certificate.comparison.nodes_alone import check_node, nodes_to_check
from lip_plugin.certificate.comparison.structure import Structure, structure_of
from lip_plugin.certificate.graph.attention import Attention
from lip_plugin.certificate.graph.base import Node
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.graph.containers import Chain, walk
from lip_plugin.certificate.graph.nodes import Scale
from lip_plugin.errors import CertificateError

# Steep functions (attention with large logits) magnify the rounding inside a library. Where a
# difference is above the tolerance, the graph is run once more on an input that is moved by this
# share. Ten times the graph's own response to that is then allowed on top of the tolerance, as long
# as both together are below 0.1.
_NUDGE = 1e-6

# Tokens of the comparison, and up to how many it goes so as to be longer than a window.
_TOKENS, _WINDOW_UP_TO = 16, 512

# The structures that passed the comparison on random weights, by model.
_CHECKED: WeakKeyDictionary[nn.Module, Structure] = WeakKeyDictionary()


@torch.no_grad()
def check_graph(graph: Graph) -> float:
    """Raise CertificateError unless what was passed to `build` computes what its graph computes.

    Args:
        graph: the graph of the object.

    Returns:
        The largest difference that was seen, relative to what the layer computes.

    Raises:
        CertificateError: something differs, and the message names the place; or the object does not
            run on float64 values.
    """
    structure = structure_of(graph)
    worst = 0.0
    with evaluating(graph.subject):
        if structure is None or _CHECKED.get(graph.root) != structure:
            with float64_parameters(graph.subject, random_values()):
                again = build(graph.subject)
                worst = _compare(again)
                for node in nodes_to_check(again.body.nodes):
                    check_node(node)
            if structure is not None:
                _CHECKED[graph.root] = structure
        return max(worst, _compare_own(graph))


def _compare_own(graph: Graph) -> float:
    """The largest difference on the object's own values.

    float32 parameters are first taken as they are, which costs no memory and a fifth of the time.
    The tolerance is the same. If rounding in float32 exceeds it (small branches, autocast, huge
    weights), float64 decides.
    """
    if all(p.dtype == torch.float32 for p in graph.subject.parameters() if p.is_floating_point()):
        try:
            return _compare(build(graph.subject))
        except CertificateError:
            pass
    with float64_parameters(graph.subject, own_values):
        return _compare(build(graph.subject))


@torch.no_grad()
def check_on_inputs(graph: Graph, inputs: Tensor) -> float:
    """Raise CertificateError unless the object's own logits on these inputs are the graph's.

    For a caller that says something about given inputs. What depends on the ids or on the length of
    a sequence (a window, a mask, a position) is seen on the very inputs.

    Args:
        graph: the graph of the object.
        inputs: token ids [batch, tokens], or pixels.

    Returns:
        The largest difference relative to the largest logit.
    """
    with evaluating(graph.subject), float64_parameters(graph.subject, exact_values):
        return _compare_on(build(graph.subject), inputs)


def _compare(graph: Graph) -> float:
    """Largest relative difference of any part, on the parameters as they are at this moment."""
    config: Any = graph.root.config
    limits = [graph.entry.longest, getattr(config, "block_size", None)]
    windows = [a.window for a in walk(graph.body.nodes) if isinstance(a, Attention) and a.window]
    windows.append(getattr(config, "sliding_window", None) or 0)
    longest = max([w + 4 for w in windows if w <= _WINDOW_UP_TO], default=0)
    tokens = min([max(_TOKENS, longest), *(int(v) for v in limits if v)])
    device = next(graph.root.parameters()).device
    inputs = graph.entry.sample(tokens, torch.Generator().manual_seed(0), device)
    return _run(graph, inputs).compare(graph, inputs)


def _compare_on(graph: Graph, inputs: Tensor) -> float:
    """Largest difference of the object's own logits on given inputs from the graph's."""
    expected = _logits(graph, inputs)
    got = graph.body.run(graph.embed(inputs, torch.float64))
    nudged = _nudged(Chain("model", graph.body.nodes), graph.embed(inputs, torch.float64))
    return _same("what it computes on these inputs", got, expected, nudged)


def _run(graph: Graph, inputs: Tensor) -> _Record:
    """Run the object's own forward, with every layer on an input of its own, and record it."""
    record = _Record(graph)
    with record.listening():
        record.logits = _logits(graph, inputs)
    return record


def _logits(graph: Graph, inputs: Tensor) -> Tensor:
    """The object's own logits. Raises CertificateError if it does not run."""
    try:
        return graph.family.logits(graph.subject, inputs).double()
    except CertificateError:
        raise
    except Exception as error:  # hooks and patches of a user may raise anything
        cure = (
            "Take off hooks, patches and wrappers that are not the library's own, then certify."
            if structure_of(graph) is None
            else f"It has to run by itself, in float64, on inputs of shape {tuple(inputs.shape)}."
        )
        raise CertificateError(
            f"{type(graph.subject).__name__} could not be compared with its graph: it does not run "
            f"with float64 weights ({type(error).__name__}: {error}). {cure}"
        ) from error


class _Record:
    """What went into every layer and came out of it, while the model ran.

    Attributes:
        received: what each layer was handed by the model.
        given: the random input that it read in place of that.
        returned: what it put out.
        logits: what the whole model put out.
    """

    def __init__(self, graph: Graph) -> None:
        self._modules = [graph.root.get_submodule(layer.name) for layer in graph.parts.layers]
        self._names = [layer.name for layer in graph.parts.layers]
        self._sizes = [_natural(block) for block in graph.blocks]
        self._generator = torch.Generator().manual_seed(3)
        self.received: list[list[Tensor]] = [[] for _ in self._modules]
        self.given: list[list[Tensor]] = [[] for _ in self._modules]
        self.returned: list[list[Tensor]] = [[] for _ in self._modules]
        self.logits: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this is open, every layer reads an input of ours in place of what it is handed."""
        ours = [(self._before(i), self._after(i)) for i in range(len(self._modules))]
        try:
            for module, (before, after) in zip(self._modules, ours, strict=True):
                # In front of all other hooks, and behind them: what they do is part of the layer.
                module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
                module.register_forward_hook(after)
            yield
        finally:  # by what they are, so that an interrupt in between leaves none behind
            for module, hooks in zip(self._modules, ours, strict=True):
                _take_off(module, hooks)

    def _before(self, i: int) -> Callable[..., Any]:
        def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            self.received[i].append(x)
            noise = torch.randn(x.shape, generator=self._generator, dtype=torch.float64)
            own = (noise * self._sizes[i]).to(x)
            self.given[i].append(own)
            return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": own})

        return replace

    def _after(self, i: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self.returned[i].append(output[0] if isinstance(output, tuple) else output)

        return note

    def compare(self, graph: Graph, inputs: Tensor) -> float:
        """The largest relative difference between this record and the graph.

        Raises CertificateError, naming the place, if a difference is above the tolerance.
        """
        name = type(graph.root).__name__
        for part, found in zip(self._names, self.received, strict=True):
            if not found:
                raise CertificateError(
                    f"{part} was not run when {name} was: something replaces the forward pass "
                    "that the graph describes."
                )
        expected = [torch.cat(found) for found in self.received]
        x = graph.embed(inputs, torch.float64)
        worst = _same("the embeddings", x, expected[0], lambda: x * (1 + _NUDGE))
        for i, block in enumerate(graph.blocks):
            own, out = torch.cat(self.given[i]), torch.cat(self.returned[i])
            node = Chain(self._names[i], block)
            worst = max(worst, _same(self._names[i], node.run(own), out, _nudged(node, own), own))
            if i + 1 < len(graph.blocks):
                where = f"what {self._names[i]} hands to {self._names[i + 1]}"
                worst = max(worst, _same(where, out, expected[i + 1], lambda out=out: out))  # type: ignore[misc]
        node, last = Chain("readout", graph.readout), torch.cat(self.returned[-1])
        assert self.logits is not None
        where = "what comes behind the last layer"
        return max(worst, _same(where, node.run(last), self.logits, _nudged(node, last)))


def _take_off(module: nn.Module, hooks: tuple[Any, ...]) -> None:
    for held in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in held.items() if any(hook is h for h in hooks)]:
            del held[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _natural(block: tuple[Node, ...]) -> float:
    """The size of a layer's input at which its branches read entries of about 1.

    The model may carry x divided by a constant, and then the first node of a branch multiplies by
    it.
    """
    first = next((chain.nodes[0] for node in block for chain in node.added() if chain.nodes), None)
    scale = abs(first.scale) if isinstance(first, Scale) else 1.0
    return 1.0 / scale if 0 < scale < math.inf else 1.0


def _nudged(node: Node, x: Tensor) -> Callable[[], Tensor]:
    """A function that runs the node on x, with each entry moved at random by a share `_NUDGE`."""

    def run() -> Tensor:
        noise = torch.randn(
            x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64
        )
        return node.run(x * (1 + _NUDGE * noise.to(x.device)))

    return run


def _same(
    where: str,
    got: Tensor,
    expected: Tensor,
    nudged: Callable[[], Tensor],
    own: Tensor | None = None,
) -> float:
    """The relative difference of two results, if it is small enough.

    It is given as 0 if it is above the tolerance and the graph's response to rounding explains it.

    Args:
        where: the place, for the message.
        got: what the graph computed.
        expected: what the model computed.
        nudged: computes `got` once more, on an input that is moved by about `_NUDGE`.
        own: the layer's input, if the layer adds it to what it computes.

    Raises:
        CertificateError: the difference is too large, or the model gives nan or inf.
    """
    difference = relative_difference(got, expected, own)
    if not difference <= TOLERANCE and got.shape == expected.shape:
        allowed = TOLERANCE + 10 * relative_difference(nudged(), got, own)
        difference = 0.0 if difference <= allowed < math.inf and allowed < 0.1 else difference
    if difference <= TOLERANCE:
        return difference
    if not bool(torch.isfinite(expected).all()):
        raise CertificateError(
            f"{where}: the model's own forward gives nan or inf even in float64, so nothing can be "
            "compared. Look at the weights of this layer (activation_report), or start from an "
            "earlier checkpoint."
        )
    raise CertificateError(
        f"The graph does not reproduce the model: {where} differs by {difference:.2e} of its size. "
        "Something besides the described modules changes the forward pass (a hook, a patched "
        "forward or attention, a softcap, a wrapper); a certificate of the graph would not be "
        "about this model."
    )
