"""Is the graph the model? Its forward, and each part that carries a rule, against the model's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lip_plugin.certificate.attention import Attention
from lip_plugin.certificate.build import Graph, build
from lip_plugin.certificate.graph import Activation, Node, Norm, walk
from lip_plugin.certificate.maps import dequantized
from lip_plugin.errors import CertificateError
from lip_plugin.modules import branch_scale, input_scale

# Libraries compute norms, softmax and rotations in float32 inside (1e-7 each, 1e-6 seen over a whole
# model); a structure that differs from the graph's is off by far more.
TOLERANCE = 1e-4
_PLAIN = (bool, int, float, str, type(None))
_CHECKED: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


def structure_of(graph: Graph) -> tuple:
    """Everything besides weights that the model's function depends on, as a value to compare.

    Classes, forward functions (of the class, or patched onto one module), hooks, plain settings, the
    model's config, and hooks on all modules at once. Objects are told apart by their id.
    """
    modules = tuple(_structure(name, m) for name, m in graph.root.named_modules())
    config = tuple(sorted((k, repr(v)) for k, v in vars(graph.root.config).items()))
    everywhere = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    return modules, config, tuple(id(hook) for hooks in everywhere for hook in hooks.values())


def _structure(name: str, module: nn.Module) -> tuple:
    cls, own = type(module), vars(module)
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # `training` is left out: the certificate is about eval mode, and the comparison made in it
    plain = {k: repr(v) for k, v in own.items() if k != "training" and _is_plain(v)}
    patched = tuple(sorted((k, id(v)) for k, v in own.items() if isinstance(v, Callable)))  # type: ignore[arg-type]
    return (
        name,
        (cls.__qualname__, id(cls), id(cls.forward)),
        module.extra_repr(),
        tuple(sorted(plain.items())),
        (tuple(map(id, hooks)), branch_scale(module), input_scale(module)),
        patched,
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return all(isinstance(v, _PLAIN) for v in value)
    return isinstance(value, _PLAIN)


@torch.no_grad()
def check_graph(graph: Graph, tokens: int = 16) -> float:
    """Compare the graph with the model itself, on a copy with random weights, in float64.

    Random weights, because at a fresh start the branches are zero and would hide any mistake in
    them. Norms, activations and rotations are compared on their own as well, where a mistake would
    be small in the logits but large in the bound. Returns the largest difference of logits over
    the largest logit (0.0 for a structure that was checked before). It finds mistakes of structure;
    a forward made to deceive, by less than `TOLERANCE` or on other inputs only, it cannot find.

    Raises CertificateError: the graph does not reproduce the model.
    """
    structure = structure_of(graph)
    if _CHECKED.get(graph.root) == structure:
        return 0.0
    config = graph.root.config
    limits = [getattr(config, k, None) for k in ("max_position_embeddings", "block_size")]
    tokens = min([tokens, *(int(v) for v in limits if v)])
    twin = _random_twin(graph.root)
    copied = build(twin)
    inputs = copied.entry.sample(tokens, torch.Generator().manual_seed(0), next(twin.parameters()).device)
    name = type(graph.root).__name__
    try:
        expected = graph.family.logits(twin, inputs).double()
    except (RuntimeError, TypeError, ValueError) as error:
        raise CertificateError(
            f"{name} could not be compared with its graph: a float64 copy of it does not run ({error}). "
            "A patched forward that still calls the original module's does this; take it off, then certify."
        ) from error
    got = copied.body.run(copied.embed(inputs, torch.float64))
    difference = _difference(got, expected)
    if not difference <= TOLERANCE:
        raise CertificateError(
            f"The graph of {name} does not reproduce the model: logits differ by {difference:.2e} of their "
            "size. Something besides the described modules changes the forward pass (a hook, a patched "
            "attention, a softcap); a certificate of the graph would not be about this model."
        )
    for node in _nodes(copied.body.nodes):
        _check_node(node)
    _CHECKED[graph.root] = structure
    return difference


def _difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry; inf where shapes differ."""
    if got.shape != expected.shape:
        return math.inf
    return float((got - expected).abs().max() / expected.abs().max())


def _nodes(nodes: Any) -> Iterator[Node]:
    """All nodes whose rule rests on more than weights, whatever contains them."""
    for node in walk(nodes):
        if isinstance(node, Attention):
            yield from (n for n in (node.q_norm, node.k_norm, node) if n is not None)
        else:
            yield node


def _check_node(node: Node) -> None:
    """Norms on both sides of their floor (or sqrt(eps)); activations over all of their range; rotations turn only."""
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
        difference = _difference(node.run(x), node.module(x).double())
    elif isinstance(node, Activation):
        x = torch.linspace(-30.0, 30.0, 961, dtype=torch.float64)
        # a branch's scale may sit on its output (OPT); any other hook is a difference
        expected = node.act(x) / branch_scale(node.act)
        difference = _difference(node.run(x), expected) * 1e5  # no float32 inside: to 1e-9
    elif isinstance(node, Attention) and node.rotary is not None:
        difference = _not_a_rotation(node)
    else:
        return
    if not difference <= TOLERANCE:
        raise CertificateError(
            f"{node.name} does not compute what its rule is proven for (off by {difference:.2e}): a hook, "
            "a patched forward or another eps. Take it off, then certify."
        )


def _not_a_rotation(node: Attention) -> float:
    """How far cos and sin are from turning pairs and scaling by `attention_scaling`."""
    positions = torch.tensor([[0, 1, 2, 7, 100, 1000, 4095]], device=node.q.linear.weight().device)
    x = torch.zeros(1, 7, node.d_in, dtype=torch.float64, device=positions.device)
    cos, sin = node.rotary(x, positions)
    half = cos.shape[-1] // 2
    if cos.shape[:2] != (1, 7) or not 0 < 2 * half == cos.shape[-1] <= node.d_head or sin.shape != cos.shape:
        return math.inf
    scale = node.rotary.scale**2
    off = ((cos.square() + sin.square()) / scale - 1.0).abs().max()
    halves = max((t[..., :half] - t[..., half:]).abs().max() for t in (cos, sin))
    return float(torch.maximum(off, halves))


# Patches of a model's own forward whose code we read: called as models are called, they are the class's forward, but the
# copy's would still run the original's. (module of the function, its name in the code); functools.wraps hides both.
_TRANSPARENT = {("trl.trainer.utils", "_fused_forward")}


def _without_patch(twin: nn.Module) -> nn.Module:
    """The copy without such a patch; any other stays, and fails the comparison if it changes what is computed."""
    function = getattr(vars(twin).get("forward"), "__func__", None)
    if (
        function is not None
        and (function.__globals__.get("__name__"), function.__code__.co_name) in _TRANSPARENT
    ):
        del vars(twin)["forward"]
    return twin


def _without_quantization(twin: nn.Module) -> nn.Module:
    """Quantized layers become plain ones, as float64 has no kernels of theirs: what they multiply with is read, not compared."""
    for name, module in list(twin.named_modules()):
        weight = dequantized(module)
        if weight is None:
            continue
        held: Any = module
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=held.bias is not None, device=weight.device)
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, plain)
    return twin


def _random_twin(root: nn.Module) -> nn.Module:
    """Deep copy in float64 and eval mode with random weights of moderate norms."""
    twin = _without_quantization(_without_patch(copy.deepcopy(root))).double().eval()
    generator = torch.Generator().manual_seed(1)
    for p in twin.parameters():
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.dim() >= 2:
            values /= math.sqrt(min(p.shape[-2:])) / 2.0
        else:
            values = 1.0 + 0.1 * values
        p.copy_(values.to(p.device))
    return twin
