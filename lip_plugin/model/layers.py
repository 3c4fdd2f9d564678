"""The modules that a retrofit leaves in a model: constrained leaves, constants, hooks that scale.

Constrained layers are made by changing the class of the layer that is there, so its Parameters,
hooks, device, dtype and forward stay the very same objects. All constants are python floats:
non-persistent buffers are garbage after a load through the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.layout import Layout


class Constrained:
    """Mixin of layers whose `weight` is capped block by block; `layout` says how."""

    layout: Layout
    weight: Tensor


class ConstrainedLinear(Constrained, nn.Linear):
    """nn.Linear, forward untouched, whose weight blocks an optimizer keeps within their caps."""


class ConstrainedEmbedding(Constrained, nn.Embedding):
    """nn.Embedding whose rows are kept within a cap in RMS norm."""


class ConstrainedConv2d(Constrained, nn.Conv2d):
    """nn.Conv2d over patches without overlap: its weight as a matrix [d, channels * p * p] is capped."""


# Layers of libraries whose forward was read, by class name: their module, and whether the weight is [d_in, d_out].
# The integrations register them, because the core imports no library and writes no name of one.
_LIBRARY_PARENTS: dict[str, str] = {}
_TRANSPOSED: set[str] = set()
_PLAIN = {
    nn.Linear: ConstrainedLinear,
    nn.Embedding: ConstrainedEmbedding,
    nn.Conv2d: ConstrainedConv2d,
}


def register_layer_class(path: str, *, transposed: bool = False) -> None:
    """Make a library's layer known, by its full name: its forward is that of the torch class that it extends or resembles.

    Args:
        path: "module.Class", a lookup (a subclass of nn.Embedding) or a linear map.
        transposed: a linear map whose weight is stored [d_in, d_out].
    """
    module, _, name = path.rpartition(".")
    _LIBRARY_PARENTS[name] = module
    if transposed:
        _TRANSPOSED.add(name)


def _is_library(cls: type) -> bool:
    return _LIBRARY_PARENTS.get(cls.__name__) == cls.__module__


def _is_transposed(cls: type) -> bool:
    return cls.__name__ in _TRANSPOSED and _is_library(cls)


def __getattr__(name: str) -> Any:
    """The constrained class of a library's layer, built when first asked for, by a name that pickle can look up."""
    parent_name = name.removeprefix("Constrained")
    if name != parent_name and parent_name in _LIBRARY_PARENTS:
        if name in globals():  # one class for ever, or earlier models could not be pickled
            return globals()[name]
        from importlib import import_module

        parent = getattr(import_module(_LIBRARY_PARENTS[parent_name]), parent_name)
        doc = f"{_LIBRARY_PARENTS[parent_name]}.{parent_name}, forward untouched, blocks or rows capped."
        cls = type(name, (Constrained, parent), {"__module__": __name__, "__doc__": doc})
        globals()[name] = cls
        return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _plain_class(module: nn.Module) -> type:
    """The class that a constrained module had before; that of any other module."""
    cls = type(module)
    return cls.__mro__[2] if isinstance(module, Constrained) else cls


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain or constrained Linear or Conv1D: a leaf that can be swapped."""
    cls = _plain_class(module)
    return cls is nn.Linear or _is_transposed(cls)


def is_patches(module: nn.Module) -> bool:
    """Whether the module is a convolution over patches without overlap: one matrix for every patch."""
    return (
        isinstance(module, nn.Conv2d)
        and _plain_class(module) is nn.Conv2d
        and (module.stride, module.padding, module.dilation) == (module.kernel_size, (0, 0), (1, 1))
        and module.groups == 1
    )


def is_embedding(module: nn.Module) -> bool:
    """Whether the module is an embedding whose lookup we know: a table whose rows can be capped."""
    cls = _plain_class(module)
    return cls is nn.Embedding or (issubclass(cls, nn.Embedding) and _is_library(cls))


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [d_in, d_out]."""
    return any(_is_transposed(cls) for cls in type(module).__mro__)


def rows_of(module: Any) -> int:
    """d_out of a linear map; a quantized layer's weight has another shape."""
    return int(
        getattr(module, "out_features", None)
        or module.weight.shape[1 if is_transposed(module) else 0]
    )


class RowParameter(Constrained):
    """A table of rows that is a bare Parameter of its module (vit's positions), seen like a layer.

    Its layout, while it is constrained, is kept on the module that owns the Parameter.
    """

    KEY = "lip_layouts"

    def __init__(self, owner: nn.Module, leaf: str) -> None:
        self.owner, self.leaf = owner, leaf

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return getattr(self.owner, self.leaf)

    @property
    def layout(self) -> Layout | None:  # type: ignore[override]
        return self.owner.__dict__.get(self.KEY, {}).get(self.leaf)


def table_of(model: nn.Module, name: str) -> Any:
    """The table with this full name, with its `weight`: an embedding module, or a RowParameter.

    Raises UnsupportedModelError if there is none.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(owner)
    except AttributeError:
        parent = model
    if isinstance(getattr(parent, leaf, None), nn.Parameter):
        return RowParameter(parent, leaf)
    if isinstance(getattr(parent, leaf, None), nn.Module):
        return getattr(parent, leaf)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no table {name!r}. Retrofit the model with its head, before any wrapper."
    )


def constrain_(module: Any, layout: Layout) -> None:
    """Make `module` constrained, in place, sharing its very Parameters.

    Raises UnsupportedModelError for a class that is not known: a subclass may compute something else
    (quantized layers do).
    """
    if isinstance(module, RowParameter):
        module.owner.__dict__.setdefault(RowParameter.KEY, {})[module.leaf] = layout
        return
    cls = type(module)
    if not isinstance(module, Constrained):
        if _is_library(cls):
            module.__class__ = __getattr__(f"Constrained{cls.__name__}")
        elif cls in _PLAIN:
            module.__class__ = _PLAIN[cls]
        else:
            raise UnsupportedModelError(
                f"{cls.__module__}.{cls.__name__} is not a plain Linear, Conv1D, Conv2d or Embedding; "
                "load the model unquantized and unwrapped, then retrofit it."
            )
    module.layout = layout


def unconstrain_(module: Any) -> None:
    """Give a constrained module its plain class back; weights and forward stay as they are."""
    if isinstance(module, RowParameter):
        layouts = module.owner.__dict__.get(RowParameter.KEY, {})
        layouts.pop(module.leaf, None)
        if not layouts:
            module.owner.__dict__.pop(RowParameter.KEY, None)
    elif isinstance(module, Constrained):
        del module.layout
        module.__class__ = type(module).__mro__[2]


def constrained_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every constrained layer, in the model's own order; bare tables as RowParameter."""
    for name, module in model.named_modules():
        if isinstance(module, Constrained):
            yield name, module
        for leaf in module.__dict__.get(RowParameter.KEY, {}):
            yield f"{name}.{leaf}" if name else leaf, RowParameter(module, leaf)
