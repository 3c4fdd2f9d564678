"""Which modules may stand between the object that a user passes and the model inside it.

A certificate is about the object that was passed. So everything around the model must be a wrapper
whose forward is known to be that of the model. A module that holds a model and is not in this
registry is refused by name, whatever it computes. `register_wrapper` adds a kind;
integrations/peft/wrappers.py adds those of peft.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules import module as torch_module

from lip_plugin.errors import UnsupportedModelError
from lip_plugin.face import require_module
from lip_plugin.model.architecture import has_family

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# The methods that a call of a wrapper goes through.
_METHODS = (
    "__call__",
    "_call_impl",
    "forward",
    "_pre_forward",
    "_post_forward",
    "_run_ddp_forward",
    "_inside_ddp_forward",
    "_sync_buffers",
    "will_sync_module_buffers",
)


@dataclass(frozen=True)
class Wrapper:
    """A kind of module that computes what the one module inside it computes.

    Attributes:
        name: What users call it.
        matches: Whether a module is of this kind. It reads attributes and never raises.
        inner: The module inside. It raises UnsupportedModelError if the wrapper does change the
            function.
        runs_here: Whether one process may run its forward at any time. The forward of DDP may wait
            for other processes, so it is not run, and must carry nothing that a user added.
        own_forward: Whether the forward is still the one that the wrapper was built with.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    inner: Callable[[nn.Module], nn.Module]
    runs_here: bool = True
    own_forward: Callable[[nn.Module], bool] = lambda module: "forward" not in vars(module)


_WRAPPERS: dict[str, Wrapper] = {}


def register_wrapper(wrapper: Wrapper) -> None:
    """Make a kind of wrapper known. One with the same name is replaced."""
    _WRAPPERS[wrapper.name] = wrapper


def is_class(module: object, path: str) -> bool:
    """Whether an object is of the class with this full name, or of a subclass.

    Nothing is imported to find out.
    """
    return any(f"{cls.__module__}.{cls.__qualname__}" == path for cls in type(module).__mro__)


def exactly(*paths: str) -> Callable[[nn.Module], bool]:
    """A test for modules of exactly these classes, given by full name.

    A subclass does not pass, because it may compute something else.
    """
    return lambda module: f"{type(module).__module__}.{type(module).__qualname__}" in paths


def _compiled_as_built(module: nn.Module) -> bool:
    """Whether a compiled module's forward is still the one that torch put there.

    The name of the function would not tell, because functools.wraps copies it. Its globals do.
    """
    code = getattr(vars(module).get("forward"), "__globals__", {})
    return str(code.get("__name__")).startswith("torch._dynamo.")


# A function that gives this attribute of a module.
def _attribute(name: str) -> Callable[[nn.Module], nn.Module]:
    return lambda module: getattr(module, name)


for _wrapper in (
    Wrapper(
        "DistributedDataParallel",
        exactly("torch.nn.parallel.distributed.DistributedDataParallel"),
        _attribute("module"),
        runs_here=False,
    ),
    Wrapper(
        "DataParallel",
        exactly("torch.nn.parallel.data_parallel.DataParallel"),
        _attribute("module"),
        runs_here=False,
    ),
    Wrapper(
        "torch.compile",
        exactly("torch._dynamo.eval_frame.OptimizedModule"),
        _attribute("_orig_mod"),
        own_forward=_compiled_as_built,
    ),
):
    register_wrapper(_wrapper)


def unwrap(model: nn.Module, marked: Callable[[nn.Module], bool]) -> tuple[nn.Module, nn.Module]:
    """Look through the wrappers around a model.

    Args:
        model: The object that a user passed, wrapped or not.
        marked: Whether a module counts as a model although its family may not be known.

    Returns:
        (subject, root). The root is the model of a known family. The subject is what to run: the
        object itself, or what is inside the innermost wrapper that one process may not run. If
        nothing known is inside, both are the object, and the caller refuses its family.

    Raises:
        UnsupportedModelError: A wrapper is not registered, or changes what is computed.
        ConfigError: The object is no module at all.
    """
    require_module(model, "a certificate")
    subject = module = model
    around: list[tuple[nn.Module, Wrapper]] = []
    while not (marked(module) or has_family(module)):
        wrapper = next((w for w in _WRAPPERS.values() if w.matches(module)), None)
        if wrapper is None:
            _refuse(model, module, marked)
            return model, model  # nothing known is inside, so the caller refuses it by name
        around.append((module, wrapper))
        module = wrapper.inner(module)
        if not wrapper.runs_here:  # then what is around it cannot be run either
            for outside, kind in around:
                _refuse_additions(outside, kind)
            subject, around = module, []
    return subject, module


def _refuse(model: nn.Module, module: nn.Module, marked: Callable[[nn.Module], bool]) -> None:
    """Raise for an unknown module that holds a model. Do nothing if it holds none."""
    inside = [(name, m) for name, m in module.named_modules() if m is not module]
    found = [(name, m) for name, m in inside if marked(m) or has_family(m)]
    if not found:
        return
    what = " and ".join(f"a {type(m).__name__} (.{name})" for name, m in found[:3])
    names = ", ".join(_WRAPPERS)
    raise UnsupportedModelError(
        f"{type(module).__module__}.{type(module).__name__} holds {what}, and what it computes "
        f"with that is not known here. Pass the model inside: model.{found[0][0]}. Wrappers that "
        f"are looked through: {names}. (lip_plugin.model.wrappers.register_wrapper makes one "
        "known that changes nothing.)"
    )


def _refuse_additions(module: nn.Module, wrapper: Wrapper) -> None:
    """Raise for a wrapper that is not as its library built it.

    It is not run, so nobody would see what was added: hooks, patched methods of the object or of
    its class, hooks on all modules at once.
    """
    cls = type(module)
    own = {key for key, value in vars(module).items() if callable(value) and hasattr(cls, key)}
    patched = own - {"forward"} or not wrapper.own_forward(module)
    methods = [inspect.unwrap(getattr(cls, name)) for name in _METHODS if hasattr(cls, name)]
    written = {getattr(method, "__globals__", {}).get("__name__") for method in methods}
    library = cls.__module__.partition(".")[0]
    foreign = any(str(name).partition(".")[0] != library for name in written)
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    if any(getattr(module, name) for name in _HOOKS) or patched or foreign or everywhere:
        raise UnsupportedModelError(
            f"The {wrapper.name} around the model carries a hook or a patched forward, which no "
            "comparison sees because its forward is not run here. Take it off, or pass the module "
            "inside."
        )
