"""A sharded model (FSDP2) as a plain one on the first process.

A certificate reads every weight, and compares its graph with the model's own forward on copies of
the model. A sharded model can neither be copied nor be run on one process alone. So its weights are
gathered, one at a time, into a plain model of the same modules, in the main memory of the first
process and without the classes and hooks of FSDP. What is asked for is computed there. Its result,
or its error, is given to all processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lip_plugin.distributed.owners import is_sharded, on_first, settle_
from lip_plugin.errors import UnsupportedModelError
from lip_plugin.face import require_module

T = TypeVar("T")
P = ParamSpec("P")
_OURS = "torch.distributed."  # the package that FSDP's hooks and states come from
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_shards(model: nn.Module) -> bool:
    """Whether a parameter or buffer of the model is a DTensor."""
    settle_(model)
    return any(is_sharded(t) for t in (*model.parameters(), *model.buffers()))


def on_first_process(model: nn.Module, function: Callable[[nn.Module], T]) -> T:
    """Call `function` on rank 0 with a plain copy of a sharded model, and give all its result.

    This is collective: every process calls it, in the same order, and gets the result.

    Args:
        model: Sharded over all processes.
        function: Takes the plain copy. Its result has to pickle.

    Returns:
        What `function` returned, on every process.

    Raises:
        UnsupportedModelError: The model is not spread over all processes.
        Exception: Whatever `function` raises is raised on every process.
    """
    values = _whole_values(model)
    return on_first(lambda: function(_copy(model, values)))


def together(model: nn.Module, function: Callable[[nn.Module], T]) -> T:
    """Call `function` on rank 0, with the model, or with a plain copy if the model is sharded.

    This is collective. Its result, or its error, is that of rank 0 on all processes.
    """
    return (
        on_first_process(model, function)
        if has_shards(model)
        else on_first(lambda: function(model))
    )


def sharded_too(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function of (model, ...) so that it takes sharded models too.

    With a sharded model the function is collective, and has the same result on all processes.
    """

    @wraps(function)
    def either(model: Any, *rest: Any, **kwargs: Any) -> T:
        call: Any = function
        require_module(model, getattr(function, "__name__", "this").lstrip("_"))
        if not has_shards(model):
            return call(model, *rest, **kwargs)
        return on_first_process(model, lambda whole: call(whole, *rest, **kwargs))

    return cast(Callable[P, T], either)


def gathered(model: nn.Module) -> nn.Module | None:
    """A plain copy of a sharded model with its whole weights.

    This is collective.

    Returns:
        The copy, on the CPU, on rank 0. None on the other processes.
    """
    settle_(model)
    values = _whole_values(model)
    return _copy(model, values) if dist.get_rank() == 0 else None


@torch.no_grad()
def _whole_values(model: nn.Module) -> dict[int, Any]:
    """The whole parameters and buffers, by the id of the model's own ones. Empty except on rank 0.

    This is collective, and does nothing but gather.
    """
    first, values = dist.get_rank() == 0, {}
    for tensor in _tensors(model):
        if is_sharded(tensor) and tensor.device_mesh.size() != dist.get_world_size():  # type: ignore[attr-defined]
            raise UnsupportedModelError(
                f"the model is sharded over {tensor.device_mesh.size()} of "  # type: ignore[attr-defined]
                f"{dist.get_world_size()} processes, so there are several models, and one "
                "certificate cannot be for all of them. Shard over a mesh of all processes."
            )
        value: Any = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        if first:
            plain = value.detach().to("cpu", copy=not is_sharded(tensor))
            if isinstance(tensor, nn.Parameter):
                plain = nn.Parameter(plain, requires_grad=tensor.requires_grad)
            values[id(tensor)] = plain
    return values


def _copy(model: nn.Module, values: dict[int, Any]) -> nn.Module:
    """A copy of the model with these values in place of its own tensors.

    Its modules are as they were before fully_shard.
    """
    with _plain_modules(model):
        return copy.deepcopy(model, dict(values))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer once, in the order of the modules, which all processes share."""
    seen: set[int] = set()
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


@contextmanager
def _plain_modules(model: nn.Module) -> Iterator[None]:
    """Inside, the modules have the classes, hooks and attributes from before fully_shard."""
    from torch.distributed.fsdp import FSDPModule

    before: list[tuple[nn.Module, type, dict[str, Any]]] = []
    try:
        for module in model.modules():
            cls, own = type(module), module.__dict__
            before.append((module, cls, dict(own)))
            for name in [k for k in own if k.startswith("__composable_api_state_key")]:
                del own[name]
            for name in _HOOKS:
                kept = [(k, hook) for k, hook in own[name].items() if not _is_distributed(hook)]
                own[name] = type(own[name])(kept)
            if isinstance(module, FSDPModule):
                module.__class__ = next(c for c in cls.__mro__[1:] if c is not FSDPModule)
        yield
    finally:
        for module, cls, own in before:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(own)


def _is_distributed(hook: Any) -> bool:
    """Whether torch.distributed registered the hook.

    The hook may be a method of one of its states, or a wrapper around such a method.
    """
    inner = getattr(hook, "__wrapped__", hook)
    owner = getattr(inner, "__self__", inner)
    module = (
        getattr(type(owner), "__module__", "")
        if owner is not inner
        else getattr(inner, "__module__", "")
    )
    return str(module).startswith(_OURS)
