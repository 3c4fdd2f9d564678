"""What a model's function depends on besides its weights, as a value that two calls can compare.

Classes, forwards, plain settings and the config are compared by identity or value; what is remembered holds on to the very
objects, so nothing that is freed and replaced can be taken for what it replaced. Hooks and patches of others may
read state that nobody can compare (an attribute, a closure). Where one is found there is no structure, so nothing is
remembered and the model is compared in full at every call. The exceptions are the hooks and patches in this file,
whose code we read.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from lip_plugin.certificate.graph.build import Graph
from lip_plugin.model.scales import (
    BranchScale,
    EntryCap,
    InputScale,
    branch_scale,
    entry_cap,
    input_scale,
)

Structure = tuple[Any, ...]
_PLAIN = (bool, int, float, str, type(None))
_OURS = (BranchScale, InputScale, EntryCap)
# Libraries whose plain functions, without a closure, keep no state of a model.
_LIBRARIES = frozenset(
    {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "lip_plugin"}
)
# Functions whose code we read, by the module and name of that code (functools.wraps hides both elsewhere).
# These set requires_grad, for gradient checkpointing.
_HARMLESS_HOOKS = {"make_inputs_require_grad", "make_inputs_require_grads"}
_FROM = {"transformers", "peft", "trl"}
# These call what they wrap, under autocast or with outputs in float32; it is what their closure holds under this name.
_AROUND = {
    ("accelerate.utils.operations", "forward"): "model_forward",
    ("torch.amp.autocast_mode", "decorate_autocast"): "func",
    (
        "trl.trainer.utils",
        "_fused_forward",
    ): "original_forward",  # for a loss; called as models are called, it only calls
}
_AROUND_OBJECT = "accelerate.utils.operations.ConvertOutputsToFp32"


def structure_of(graph: Graph) -> Structure | None:
    """The structure of the model and of everything around it; None if something foreign is there (see above)."""
    everywhere = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    if any(everywhere):
        return None
    found = []
    for name, module in graph.subject.named_modules():
        one = _structure(name, module)
        if one is None:
            return None
        found.append(one)
    return (*found, tuple(_config(graph.root)))


def _config(root: nn.Module) -> Iterator[tuple[str, str]]:
    held: Any = root.config
    yield from sorted((k, repr(v)) for k, v in vars(held).items())


def _structure(name: str, module: nn.Module) -> Structure | None:
    cls, own = type(module), vars(module)
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    known = all(isinstance(hook, _OURS) or _is_harmless(hook) for hook in hooks)
    if not known or not _is_own_forward(cls):
        return None
    functions = []
    for key, value in sorted(own.items()):
        if not callable(value) or isinstance(value, nn.Module):
            continue
        found = _known_function(module, key, value)
        if found is None:
            return None
        functions.append((key, found))
    # `training` is left out: the certificate is about eval mode, and the comparison is made in it
    plain = tuple(sorted((k, repr(v)) for k, v in own.items() if k != "training" and _is_plain(v)))
    tensors = tuple((k, v, v._version) for k, v in sorted(own.items()) if isinstance(v, Tensor))
    scales = (branch_scale(module), input_scale(module), entry_cap(module))
    return (
        name,
        cls,
        cls.forward,
        module.extra_repr(),
        plain,
        _Same(tensors),
        scales,
        _Same(functions),
    )


class _Same:
    """Holds objects, and is equal to another that holds the very same ones."""

    def __init__(self, held: Any) -> None:
        self._held = tuple(held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and _identical(self._held, other._held)

    __hash__ = None  # type: ignore[assignment]


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_identical(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, (str, int)) and type(a) is type(b) and a == b)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return all(isinstance(v, _PLAIN) for v in value)
    return isinstance(value, _PLAIN)


def _is_own_forward(cls: type) -> bool:
    """Whether a class's forward was written with the class, or with one of its parents, or is its library's decoration of it."""
    written = _written(cls.forward)[0]  # type: ignore[attr-defined]
    modules = {base.__module__ for base in cls.__mro__}
    return (
        written in modules or written.partition(".")[0] in {_top(m) for m in modules} & _LIBRARIES
    )


def _is_harmless(hook: Callable[..., Any]) -> bool:
    module, name = _written(hook)
    return name in _HARMLESS_HOOKS and _top(module) in _FROM


def _top(module: str) -> str:
    return module.partition(".")[0]


def _known_function(module: nn.Module, name: str, value: Any) -> tuple[Any, ...] | None:
    """The functions that a callable attribute is made of, if all of them are known to keep no state; else None."""
    parts: list[Any] = []
    for _ in range(8):
        if isinstance(value, types.MethodType):
            owner, method = value.__self__, value.__func__
            if owner is not module and getattr(type(owner), method.__name__, None) is not method:
                return None
            if (
                owner is not module
            ):  # another object's own method, as peft keeps some: no forward, and a library's code
                known = name != "forward" and _top(_written(method)[0]) in _LIBRARIES
                return (*parts, method) if known else None
            value = method
        elif isinstance(value, functools.partial):
            if not _is_plain(value.args) or not _is_plain(value.keywords):
                return None
            parts.append(repr((value.args, value.keywords)))
            value = value.func
        if _written(value) in _AROUND:
            parts.append(value.__code__)  # not the function: its closure may hold the model
            value = _cell(value, _AROUND[_written(value)])
        elif f"{type(value).__module__}.{type(value).__qualname__}" == _AROUND_OBJECT:
            value = value.model_forward
        else:
            return (*parts, value) if _is_plain_function(value, module) else None
    return None


def _is_plain_function(value: Any, module: nn.Module) -> bool:
    """Whether it is code of a library (or the class's own) that carries nothing with it."""
    if value is checkpoint or any(
        value is getattr(cls, "forward", None) for cls in type(module).__mro__
    ):
        return True
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None and _top(_written(value)[0]) in _LIBRARIES
    return (
        isinstance(value, (types.BuiltinFunctionType, type))
        and _top(str(value.__module__)) in _LIBRARIES
    )


def _written(function: Any) -> tuple[str, str]:
    """Module and name of the code that a function runs; empty for what is no Python function."""
    code = getattr(function, "__code__", None)
    module = getattr(function, "__globals__", {}).get("__name__", "")
    return str(module), "" if code is None else str(code.co_name)


def _cell(function: Any, name: str) -> Any:
    """What a function's closure holds under a name; None for nothing."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return next((c.cell_contents for n, c in zip(names, cells, strict=True) if n == name), None)
