"""`structure_of`: what a model's function depends on besides its weights, as a value to compare.

The comparison on random weights (compare.py) is not repeated while the structure is the same. The
structure holds classes, forwards, plain settings and the config, and compares them by identity or
by value. It keeps the objects themselves alive. So an object that was freed and replaced cannot be
taken for the one that replaced it.

Hooks and patches of others may read state that nobody can compare, such as an attribute or a
closure. If one is found, there is no structure. Then nothing is remembered, and the model is
compared in full at every call. The exceptions are hooks and patches whose code was read.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
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
_LARGE_BUFFER = 1 << 22  # entries; a mask of 2048 x 2048 is within
_PLAIN = (bool, int, float, str, type(None))
_OURS = (BranchScale, InputScale, EntryCap)
# What follows is known because its code was read. Code is told by the module and the name that it
# was written with, since functools.wraps hides both everywhere else. The integrations register what
# their libraries bring (integrations/known_code.py).

# A plain function of these libraries, if it has no closure, keeps no state of a model.
_LIBRARIES = {"torch", "lip_plugin"}
_HARMLESS_HOOKS: set[tuple[str, str]] = set()  # (library, name) of hooks that change no value
# Functions that only call what they wrap, with the name under which their closure holds that.
_AROUND = {("torch.amp.autocast_mode", "decorate_autocast"): "func"}
_AROUND_OBJECTS: dict[str, str] = {}  # the same for objects: class, and attribute


def know_library(name: str) -> None:
    """Take plain functions of this library, without a closure, for code without state."""
    _LIBRARIES.add(name)


def know_hook(library: str, name: str) -> None:
    """Take hooks of this name, from any module of the library, for ones that change no value."""
    _HARMLESS_HOOKS.add((library, name))


def know_patch(module: str, name: str, holds: str) -> None:
    """Look through a function that only calls what its closure holds under a name."""
    _AROUND[module, name] = holds


def know_caller(path: str, attribute: str) -> None:
    """Look through objects of a class that only call what they hold in an attribute."""
    _AROUND_OBJECTS[path] = attribute


def structure_of(graph: Graph) -> Structure | None:
    """The structure of the model and of everything around it.

    It is None if there is a hook or patch that is not known (see the docstring of this file).
    """
    everywhere = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    if any(everywhere):
        return None
    found = []
    for name, module in graph.subject.named_modules():
        one = _structure(name, module)
        if one is None:
            return None
        found.append(one)
    library = graph.family.depends_on(graph.root)
    if any(not _is_plain_function(value, graph.root) for value in library):
        return None
    return (*found, tuple(_config(graph.root)), _Same(library))


def _config(root: nn.Module) -> Iterator[tuple[str, str]]:
    held: Any = root.config
    yield from sorted((k, repr(v)) for k, v in vars(held).items())


# The structure of one module without those inside, or None if something in it is not known.
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
    # `training` is left out, because the certificate is about eval mode and the comparison is made
    # in eval mode.
    plain = tuple(sorted((k, repr(v)) for k, v in own.items() if k != "training" and _is_plain(v)))
    held = [*own.items(), *module._buffers.items()]
    tensors = tuple(
        (k, v, *_content(v)) for k, v in sorted(held, key=lambda kv: kv[0]) if isinstance(v, Tensor)
    )
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


def _content(tensor: Tensor) -> tuple[int, float]:
    """Shows that a tensor was written to: its version, and a weighted sum of its entries.

    The sum is for writes through `.data`, which the version misses. It is left out for large
    tensors and on the meta device.
    """
    if tensor.is_meta or not 0 < tensor.numel() <= _LARGE_BUFFER:
        return tensor._version, 0.0
    flat = tensor.detach().double().flatten()
    return tensor._version, float(
        flat @ torch.linspace(1.0, 2.0, len(flat), dtype=flat.dtype, device=flat.device)
    )


class _Same:
    """Holds objects, and is equal to another `_Same` that holds the very same objects."""

    def __init__(self, held: Any) -> None:
        self._held = tuple(held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and _identical(self._held, other._held)

    __hash__ = None  # type: ignore[assignment]


# Whether two values are the same object. Tuples are compared item by item, text and int by value.
def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_identical(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, (str, int, float)) and type(a) is type(b) and a == b)


# Whether a value is a number, text, bool or None, or a flat collection of these.
def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return all(isinstance(v, _PLAIN) for v in value)
    return isinstance(value, _PLAIN)


def _is_own_forward(cls: type) -> bool:
    """Whether a class has the forward that it was written with.

    Its code is then from the module of the class or of one of its parents, or it is a decoration of
    it by a known library that the class is from.
    """
    written = _written(cls.forward)[0]  # type: ignore[attr-defined]
    modules = {base.__module__ for base in cls.__mro__}
    return (
        written in modules or written.partition(".")[0] in {_top(m) for m in modules} & _LIBRARIES
    )


# Whether a hook is one of `_HARMLESS_HOOKS`, by the code that it runs.
def _is_harmless(hook: Callable[..., Any]) -> bool:
    module, name = _written(hook)
    return (_top(module), name) in _HARMLESS_HOOKS


# The top-level package of a module.
def _top(module: str) -> str:
    return module.partition(".")[0]


def _known_function(module: nn.Module, name: str, value: Any) -> tuple[Any, ...] | None:
    """The functions that a callable attribute is made of.

    It is None if one of them is not known to keep no state.
    """
    parts: list[Any] = []
    for _ in range(8):
        if isinstance(value, types.MethodType):
            owner, method = value.__self__, value.__func__
            if owner is not module and getattr(type(owner), method.__name__, None) is not method:
                return None
            if owner is not module:
                # The method of another object, and not a patched one. peft keeps some. It is known
                # if it is a library's code and does not stand for the forward.
                known = name != "forward" and _top(_written(method)[0]) in _LIBRARIES
                return (*parts, method) if known else None
            value = method
        elif isinstance(value, functools.partial):
            if not _is_plain(value.args) or not _is_plain(value.keywords):
                return None
            parts.append(repr((value.args, value.keywords)))
            value = value.func
        if _written(value) in _AROUND:
            # the code and not the function, because its closure may hold the model
            parts.append(value.__code__)
            value = _cell(value, _AROUND[_written(value)])
        elif _class_path(value) in _AROUND_OBJECTS:
            value = getattr(value, _AROUND_OBJECTS[_class_path(value)])
        else:
            return (*parts, value) if _is_plain_function(value, module) else None
    return None


def _is_plain_function(value: Any, module: nn.Module) -> bool:
    """Whether a function is a library's, or the class's own forward, and carries no state."""
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


def _class_path(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _written(function: Any) -> tuple[str, str]:
    """Module and name of the code that a function runs. Empty if it is no Python function."""
    code = getattr(function, "__code__", None)
    module = getattr(function, "__globals__", {}).get("__name__", "")
    return str(module), "" if code is None else str(code.co_name)


def _cell(function: Any, name: str) -> Any:
    """What a function's closure holds under a name, or None."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return next((c.cell_contents for n, c in zip(names, cells, strict=True) if n == name), None)
