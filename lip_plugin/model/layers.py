"""The constrained layers that a retrofit leaves in a model, and which layers can become one.

A layer is constrained by changing the class of the very module that is there. So its Parameters,
hooks, device, dtype and forward stay the same objects. All constants are python floats, because
non-persistent buffers hold garbage after a load through the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.layout import Layout


class Constrained:
    """Mixin of layers whose `weight` is capped block by block. `layout` says which blocks."""

    layout: Layout
    weight: Tensor


class ConstrainedLinear(Constrained, nn.Linear):
    """nn.Linear whose weight blocks an optimizer keeps within their caps.

    The forward is untouched.
    """


class ConstrainedEmbedding(Constrained, nn.Embedding):
    """nn.Embedding whose rows are kept within a cap in RMS norm."""


class ConstrainedConv2d(Constrained, nn.Conv2d):
    """nn.Conv2d over patches that do not overlap.

    What is capped is its weight, read as a matrix [d, channels * p * p].
    """


# Layer classes of libraries whose forward was read: class name -> module, and the names of those
# that store their weight [d_in, d_out]. The integrations register them, because the core imports no
# library and writes no name of one.
_LIBRARY_PARENTS: dict[str, str] = {}
_TRANSPOSED: set[str] = set()
_PLAIN = {
    nn.Linear: ConstrainedLinear,
    nn.Embedding: ConstrainedEmbedding,
    nn.Conv2d: ConstrainedConv2d,
}


def register_layer_class(path: str, *, transposed: bool = False) -> None:
    """Make a layer class of a library known.

    Register a class only after its forward was read: it has to be that of the torch class which it
    extends or resembles.

    Args:
        path: "module.Class", the full name of a lookup (a subclass of nn.Embedding) or a linear
            map.
        transposed: Whether it is a linear map whose weight is stored [d_in, d_out].
    """
    module, _, name = path.rpartition(".")
    _LIBRARY_PARENTS[name] = module
    if transposed:
        _TRANSPOSED.add(name)


# Whether this class was registered.
def _is_library(cls: type) -> bool:
    return _LIBRARY_PARENTS.get(cls.__name__) == cls.__module__


# Whether this class was registered as one that stores its weight [d_in, d_out].
def _is_transposed(cls: type) -> bool:
    return cls.__name__ in _TRANSPOSED and _is_library(cls)


def __getattr__(name: str) -> Any:
    """The constrained class of a library's layer, built when it is first asked for.

    Its name, "Constrained" and the name of the class, is one that pickle can look up here.
    """
    parent_name = name.removeprefix("Constrained")
    if name != parent_name and parent_name in _LIBRARY_PARENTS:
        # There must be one class for ever. With a second one, earlier models could not be pickled.
        if name in globals():
            return globals()[name]
        from importlib import import_module

        parent = getattr(import_module(_LIBRARY_PARENTS[parent_name]), parent_name)
        doc = (
            f"{_LIBRARY_PARENTS[parent_name]}.{parent_name}, forward untouched, "
            "blocks or rows capped."
        )
        cls = type(name, (Constrained, parent), {"__module__": __name__, "__doc__": doc})
        globals()[name] = cls
        return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _plain_class(module: nn.Module) -> type:
    """The class that a constrained module had before. For other modules it is their own."""
    cls = type(module)
    return cls.__mro__[2] if isinstance(module, Constrained) else cls


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map that can be constrained, or is already.

    That is a torch Linear, or a registered class that stores its weight transposed.
    """
    cls = _plain_class(module)
    return cls is nn.Linear or _is_transposed(cls)


def is_patches(module: nn.Module) -> bool:
    """Whether the module is a convolution over patches that do not overlap.

    It is then one matrix, applied to every patch.
    """
    return (
        isinstance(module, nn.Conv2d)
        and _plain_class(module) is nn.Conv2d
        and (module.stride, module.padding, module.dilation) == (module.kernel_size, (0, 0), (1, 1))
        and module.groups == 1
    )


def is_embedding(module: nn.Module) -> bool:
    """Whether the module is an embedding whose lookup is known, so that its rows can be capped."""
    cls = _plain_class(module)
    return cls is nn.Embedding or (issubclass(cls, nn.Embedding) and _is_library(cls))


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [d_in, d_out]."""
    return any(_is_transposed(cls) for cls in type(module).__mro__)


def rows_of(module: Any) -> int:
    """d_out of a linear map.

    It asks `out_features` first, because a quantized layer's weight has another shape.
    """
    return int(
        getattr(module, "out_features", None)
        or module.weight.shape[1 if is_transposed(module) else 0]
    )


class RowParameter(Constrained):
    """A table of rows that is a bare Parameter of its module, seen as a layer.

    The positions of vit are such a table. While it is constrained, its layout is kept on the module
    that owns the Parameter.
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
    """The table with this full name: an embedding module, or a RowParameter. Both have `weight`.

    Raises:
        UnsupportedModelError: There is no table of this name.
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
        f"{type(model).__name__} has no table {name!r}. Retrofit the model with its head, before "
        "any wrapper."
    )


def constrain_(module: Any, layout: Layout) -> None:
    """Make `module` constrained in place. It keeps its very Parameters.

    Args:
        module: A layer, or a RowParameter.
        layout: Its blocks and their caps.

    Raises:
        UnsupportedModelError: The class is not known. A subclass of a known one may compute
            something else, as quantized layers do.
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
                f"{cls.__module__}.{cls.__name__} is not a plain Linear, Conv1D, Conv2d or "
                "Embedding; load the model unquantized and unwrapped, then retrofit it."
            )
    module.layout = layout


def unconstrain_(module: Any) -> None:
    """Give a constrained module its plain class back.

    Its weights and its forward stay as they are.
    """
    if isinstance(module, RowParameter):
        layouts = module.owner.__dict__.get(RowParameter.KEY, {})
        layouts.pop(module.leaf, None)
        if not layouts:
            module.owner.__dict__.pop(RowParameter.KEY, None)
    elif isinstance(module, Constrained):
        del module.layout
        module.__class__ = type(module).__mro__[2]


def constrained_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of every constrained layer, in the model's own order.

    A bare table comes as a RowParameter.
    """
    for name, module in model.named_modules():
        if isinstance(module, Constrained):
            yield name, module
        for leaf in module.__dict__.get(RowParameter.KEY, {}):
            yield f"{name}.{leaf}" if name else leaf, RowParameter(module, leaf)
