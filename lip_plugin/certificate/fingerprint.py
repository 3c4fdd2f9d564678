"""The fingerprint and the settings that tell which model a certificate belongs to.

A fingerprint is a sha256 over the name, dtype, shape and bytes of every parameter and persistent
buffer. It does not depend on device, process or order. It is the same for a model in memory and for
the safetensors file of that model.

A certificate from caps belongs to a structure and not to weights. Its fingerprint therefore takes
the caps of capped weights in place of their bytes. Tensors without a cap (biases, gains of kept
norms) count with their bytes there too, because they enter the bound as they are.

The settings are what the model's config says about the function that the model computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lip_plugin.certificate.function_facts import buffers_of, function_of
from lip_plugin.certificate.graph.build import Graph
from lip_plugin.config import LipschitzConfig
from lip_plugin.config_values import LEGACY
from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.batches import refuse_sharded
from lip_plugin.model.layers import RowParameter, constrained_modules
from lip_plugin.model.normalization import Floored
from lip_plugin.model.saved_names import recorded
from lip_plugin.surgery.state import find_retrofit

# Fields of a model's config that do not change the function that is certified. That function goes
# from ids to logits, in eval mode and in real arithmetic. vocab_size is left out as well, because
# the shapes of the weights tell it already.
_NO_EFFECT = frozenset(
    {
        *(
            "transformers_version",
            "architectures",
            "dtype",
            "torch_dtype",
            "quantization_config",
            "vocab_size",
        ),
        *(
            "use_cache",
            "output_attentions",
            "output_hidden_states",
            "return_dict",
            "chunk_size_feed_forward",
        ),
        *(
            "id2label",
            "label2id",
            "problem_type",
            "task_specific_params",
            "initializer_range",
            "auto_map",
        ),
        *("dropout", "keys_to_ignore_at_inference"),
    }
)
_NO_EFFECT_ENDINGS = ("_token_id", "_dropout", "_pdrop", "_dropout_prob")


class Fingerprint:
    """Collects tensors one by one, in any order.

    `value()` gives the fingerprint of all tensors that were added so far.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, list[int], str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor with its values. If it has several names, add it under each of them."""
        self._entries[name] = (str(tensor.dtype), list(tensor.shape), _digest(name, tensor))

    def add_alias(self, name: str, other: str) -> None:
        """Add `name` as a further name of the tensor that was added as `other`."""
        self._entries[name] = self._entries[other]

    def add_capped(self, name: str, tensor: Tensor, layout: tuple) -> None:
        """Add a tensor with its caps in place of its values.

        Args:
            name: the tensor's name.
            tensor: the tensor. Only its dtype and shape are read, so it may be on the meta device.
            layout: the blocks and their caps, as `Layout.to_plain` gives them.
        """
        self._entries[name] = (str(tensor.dtype), list(tensor.shape), json.dumps(layout))

    def value(self) -> str:
        text = json.dumps(sorted(self._entries.items()))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _digest(name: str, tensor: Tensor) -> str:
    """sha256 of the tensor's bytes: row-major, own dtype, little-endian as in safetensors."""
    refuse_sharded(tensor)
    if tensor.is_meta or (tensor.numel() and not tensor.data_ptr()):
        raise UnsupportedModelError(
            f"{name} is a {type(tensor).__name__} on {tensor.device} without values of its own: "
            "nothing to fingerprint. Load the model, plain and unquantized, then certify."
        )
    plain = tensor.detach().cpu().contiguous()
    size = plain.numel() * plain.element_size()
    view = (ctypes.c_char * size).from_address(plain.data_ptr()) if size else b""
    return hashlib.sha256(view).hexdigest()


def stored_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by its name. A shared one is there under each name."""
    found: dict[str, Tensor] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        kept = [
            (n, b)
            for n, b in module._buffers.items()
            if n not in module._non_persistent_buffers_set
        ]
        for leaf, tensor in (*module._parameters.items(), *kept):
            if tensor is not None:
                found[f"{name}.{leaf}" if name else leaf] = tensor
    # A library may store more (the states of quantized weights). What a hook takes out stays in.
    stored = root.state_dict(keep_vars=True)
    return {**{k: v for k, v in stored.items() if isinstance(v, Tensor)}, **found}


def fingerprint(root: nn.Module, source: str = "weights") -> str:
    """The fingerprint of a model's parameters and persistent buffers, as `"sha256:..."`.

    Args:
        root: the model of a known family, without wrappers.
        source: `"weights"` takes the bytes of all tensors. `"caps"` takes the caps of capped
            weights, and the bytes of all other tensors.

    Raises:
        UnsupportedModelError: a tensor is sharded, or has no values (on the meta device).
    """
    found = Fingerprint()
    caps = capped_weights(root) if source == "caps" else {}
    names: dict[int, str] = {}
    for name, tensor in stored_tensors(root).items():
        if name in caps:
            found.add_capped(name, tensor, caps[name])
        elif id(tensor) in names:
            found.add_alias(name, names[id(tensor)])
        else:
            found.add(name, tensor)
            names[id(tensor)] = name
    return found.value()


def capped_weights(root: nn.Module) -> dict[str, tuple]:
    """The layout of every weight whose blocks are capped, as plain data, by the weight's name."""
    return {
        name if isinstance(module, RowParameter) else f"{name}.weight": module.layout.to_plain()
        for name, module in constrained_modules(root)
    }


def settings_of(root: nn.Module) -> dict[str, Any]:
    """What the model's config says about its function, in types that JSON has.

    Of a retrofitted model its LipschitzConfig is included, as "lipschitz". Floors under norms are
    included as "floors".
    """
    config: Any = root.config
    values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    kept = {
        k: recorded(v)
        for k, v in values.items()
        if not k.startswith("_") and k not in _NO_EFFECT and not k.endswith(_NO_EFFECT_ENDINGS)
    }
    state = find_retrofit(root)
    if state is not None:
        kept["lipschitz"] = state[1].config.to_dict()
    # Floors under norms are listed on their own: they change no weight, and they stay when
    # `release` takes the LipschitzConfig off a model.
    floors = {n: m.floor for n, m in root.named_modules() if isinstance(m, Floored) and m.floor}
    if floors:
        kept["floors"] = floors
    text = json.dumps(kept, sort_keys=True, default=lambda v: type(v).__name__)
    return json.loads(text, parse_constant=str)


def settings_with_function(graph: Graph) -> dict[str, Any]:
    """What a certificate records of a model besides its weights: settings, function, buffers."""
    function, buffers = function_of(graph), buffers_of(graph.root)
    return {**settings_of(graph.root), "function": function, "buffers": buffers}


def differences(stated: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line for every setting of a certificate (`stated`) that is another in a model (`found`).

    A setting that only `found` has is newer than the certificate. If it is a field of a library's
    config, it is ignored. If it is an option of the retrofit, it must be at its default, because
    the default leaves a model as it was before the option existed.
    """
    now, before = {"floors": {}, **found}, {"floors": {}, **stated}
    functions = [side.pop("function", None) for side in (now, before)]
    buffers = [side.pop("buffers", None) or {} for side in (now, before)]
    retrofitted, was = now.pop("lipschitz", None), before.pop("lipschitz", None)
    pairs = [(key, now.get(key), value) for key, value in sorted(before.items())]
    if retrofitted is not None and was is not None:
        defaults = {**LipschitzConfig().to_dict(), **LEGACY}
        pairs += [
            (key, retrofitted.get(key), was.get(key, defaults.get(key)))
            for key in sorted({**was, **retrofitted})
        ]
    elif retrofitted != was:
        pairs.append(("lipschitz", retrofitted, was))
    # older certificates carry no "function", and then there is nothing to compare
    if functions[0] is not None and functions[1] is not None:
        places = sorted({*functions[0], *functions[1]})
        pairs += [(place, functions[0].get(place), functions[1].get(place)) for place in places]
    # A model that is streamed has no values in these, so only what both have is compared.
    shared = sorted(buffers[0].keys() & buffers[1].keys())
    pairs += [(f"buffer {name}", buffers[0][name], buffers[1][name]) for name in shared]
    return [f"{key} is {a!r} and was {b!r}" for key, a, b in pairs if a != b]
