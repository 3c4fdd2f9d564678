"""Run an object as it is, with every hook and wrapper, but with float64 values in its parameters.

The comparison of a graph with a model (compare.py) uses this. The values are the object's own in
float64, or random ones. Quantized layers, which cannot run in float64, are replaced by plain ones.
Everything is put back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.errors import CertificateError
from lip_plugin.model.adapters import dequantized

# Weights are taken as they are if the root mean square of a matrix's singular values, or of a
# vector's entries, is at most this.
_LARGE = 16.0


@contextmanager
def evaluating(subject: nn.Module) -> Iterator[None]:
    """While this is open, the object is in eval mode, and nothing is compiled.

    Afterwards every module has its training flag, its buffers and its plain attributes back. Some
    forwards change them (rotations that grow with the length of what they have seen).
    """
    before = [(module, _state(module)) for module in subject.modules()]
    try:
        for module, _ in before:
            module.training = False
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _restore(before)


_Kept = tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]
_CLONED = 1 << 16  # entries up to which a buffer is copied, in case that it is written in place


def _state(module: nn.Module) -> _Kept:
    kinds = (bool, int, float, str, Tensor)
    plain = {k: v for k, v in vars(module).items() if isinstance(v, kinds)}
    buffers = dict(module._buffers)
    copies = {k: b.clone() for k, b in buffers.items() if b is not None and b.numel() <= _CLONED}
    return plain, buffers, copies


def _restore(before: list[tuple[nn.Module, _Kept]]) -> None:
    """Put everything back, also if an interrupt comes while it is being put back."""
    try:
        for module, (plain, buffers, copies) in before:
            vars(module).update(plain)
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, copy in copies.items():
                held = buffers[name]
                if held is not None and not held.is_meta and not torch.equal(held, copy):
                    held.copy_(copy)
    except BaseException:
        _restore(before)
        raise


@contextmanager
def float64_parameters(subject: nn.Module, values: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While this is open, every floating-point parameter of the object is a float64 one.

    A quantized layer is replaced by a plain one meanwhile.

    Args:
        subject: the object that is run.
        values: gives the float64 values for a parameter, see `own_values` and `random_values`. A
            parameter that is shared is asked for once.

    Raises:
        CertificateError: a quantized layer has a patched forward.
    """
    made: dict[int, nn.Parameter] = {}
    own = [(m, dict(m._parameters), dict(m._modules)) for m in subject.modules()]
    try:
        for module in list(subject.modules()):
            for name, child in list(module._modules.items()):
                weight = None if child is None else dequantized(child)
                if child is not None and weight is not None:
                    module._modules[name] = _plain(child, weight)
        for module in subject.modules():
            for name, p in module._parameters.items():
                if p is None or not p.is_floating_point():
                    continue
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(values(p), requires_grad=False)
                module._parameters[name] = made[id(p)]
        yield
    finally:
        _put_back(own)


def _put_back(own: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]) -> None:
    """Every module gets its own parameters and modules back, also if an interrupt comes."""
    try:
        for module, parameters, modules in own:
            module._parameters.update(parameters)
            module._modules.update(modules)
    except BaseException:
        _put_back(own)
        raise


def _plain(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A Linear to run in place of a quantized layer, with the hooks of that layer.

    Quantized layers have no kernels for float64.
    """
    if "forward" in vars(layer):
        raise CertificateError(
            f"a quantized {type(layer).__name__} has a patched forward. Take it off, then certify."
        )
    held: Any = layer
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=held.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if held.bias is not None:
        plain.bias = held.bias
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
        setattr(plain, hooks, getattr(layer, hooks))
    return plain


def exact_values(p: Tensor) -> Tensor:
    """The parameter's own values in float64."""
    return p.detach().to(torch.float64, copy=True)


def own_values(p: Tensor) -> Tensor:
    """The parameter's own values in float64, scaled down if they are very large.

    With very large values, products would overflow and every softmax would saturate. The comparison
    is about how values are combined, so a factor on a whole parameter takes nothing from it.
    """
    own = exact_values(p)  # a copy: nothing may be written to the user's own
    largest = _LARGE * math.sqrt(min(p.shape[-2:]) if p.dim() >= 2 else max(1, p.numel()))
    size = float(own.abs().amax()) if own.numel() else 0.0
    if size == 0 or not math.isfinite(size):
        return own
    norm = size * float(torch.linalg.vector_norm(own / size))
    return own if norm <= largest else own * (largest / norm)


def random_values() -> Callable[[Tensor], Tensor]:
    """A function that gives random float64 values for a parameter, of moderate norms.

    Each parameter gets other values. Every process gets the same ones.
    """
    generator = torch.Generator().manual_seed(1)

    def values(p: Tensor) -> Tensor:
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.dim() >= 2:
            drawn /= math.sqrt(min(p.shape[-2:])) / 2.0
        else:
            drawn = 1.0 + 0.1 * drawn
        return drawn.to(p.device)

    return values
