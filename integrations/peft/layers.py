"""peft's layers, told by their attributes (peft is never imported): which there are, and what each multiplies with.

    LoRA, rslora    W0 + s B A                      several active adapters add up
    DoRA            diag(m / rows(V)) V             V = W0 + s B A, rows(V) its rows' 2-norms; one active adapter
    OFT, COFT       W0 R^T                          R block by block the Cayley transform of a skew matrix: orthogonal
    HRA             W0 H_1 H_2 ...                  reflections: orthogonal

The last two turn what enters W0 and change the norm of no block of rows, so within a cap they need no projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.errors import TrainerError, UnsupportedModelError
from lip_plugin.model.adapters import dequantized
from lip_plugin.model.layers import Constrained, is_linear, is_transposed
from lip_plugin.model.scales import entry_cap

LORA, DORA, OFT, HRA = "lora", "dora", "oft", "hra"
TURNING = (OFT, HRA)
BUDGET = "lip_budget"  # attribute of a layer: see peft_budget.py


def kind_of(layer: Any) -> str | None:
    """Which of the four a module is; None for a module that wraps no layer. Raises UnsupportedModelError for any other tuner."""
    if not isinstance(getattr(layer, "base_layer", None), nn.Module):
        return None
    if hasattr(layer, "oft_R"):
        return OFT
    if hasattr(layer, "hra_u"):
        return HRA
    if not hasattr(layer, "lora_A"):
        raise UnsupportedModelError(
            f"{type(layer).__module__}.{type(layer).__name__} has no rule here: its weight's norm is neither kept by "
            "itself (as by OFT and HRA) nor by a projection (as with LoRA). Use LoraConfig, OFTConfig or HRAConfig."
        )
    magnitudes = getattr(layer, "lora_magnitude_vector", None) or ()
    return DORA if any(a in magnitudes for a in active(layer)) else LORA


def wrapped_layers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """(name, layer, kind) of every layer that an adapter wraps and whose weight can be held.

    Raises UnsupportedModelError, by name and with the cure, for adapters without a rule.
    """
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Module):
            continue
        held = isinstance(base, Constrained) or BUDGET in module.__dict__
        if not hasattr(module, "lora_A") and not held:
            continue  # what another library wraps, and nobody asked us to hold
        try:
            kind = kind_of(module)
            refuse_function(module)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{name} is wrapped by {error}") from None
        assert kind is not None
        _refuse_place(name, module, held)
        yield name, module, kind


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the LoRA and DoRA layers among `wrapped_layers`."""
    return ((name, layer) for name, layer, kind in wrapped_layers(model) if kind not in TURNING)


def _refuse_place(name: str, layer: Any, held: bool) -> None:
    """Adapters where nothing could be held."""
    base = layer.base_layer
    if len(getattr(layer, "lora_embedding_A", ())):
        raise UnsupportedModelError(
            f"{name}: LoRA on an embedding has no projection here, and its rows are capped. Leave the "
            "embedding out of target_modules."
        )
    if not held or hasattr(layer, "parameter_name"):
        raise UnsupportedModelError(
            f"{name}: LoRA on {type(base).__name__}, which has no cap. Order: retrofit(model), then "
            "get_peft_model; target linear layers that the retrofit's report lists. Without a retrofit, bound the change: "
            "constrain_adapters(model, budget=0.1, relative=True)."
        )
    if entry_cap(base) is not None:
        raise UnsupportedModelError(
            f"{name}: its output is capped entrywise (gate_max), and an adapter adds behind the cap. Leave this layer "
            "out of target_modules, or retrofit with gate_max=None."
        )


def refuse_function(layer: Any) -> None:
    """Raise UnsupportedModelError for an adapter whose function is not that of one of the weights above."""
    kind = kind_of(layer)
    what = f"{type(layer).__module__}.{type(layer).__name__}"
    if kind == OFT:
        if any(layer.oft_R[a].use_cayley_neumann for a in active(layer)):
            raise UnsupportedModelError(
                f"{what} with use_cayley_neumann=True, a truncated series that is not orthogonal and lengthens the weight. "
                "Use OFTConfig(use_cayley_neumann=False)."
            )
        return
    if kind == HRA:
        return
    variants = getattr(layer, "lora_variant", None) or {}
    odd = [v for a, v in variants.items() if a in active(layer) and "Dora" not in type(v).__name__]
    if odd or hasattr(layer, "lora_E"):
        raise UnsupportedModelError(
            f"{what}, a variant of LoRA ({type(odd[0]).__name__ if odd else 'AdaLoRA'}) that computes another weight than "
            "W0 + s B A. Use a plain LoraConfig, or use_dora=True."
        )
    if kind == DORA and len(active(layer)) > 1:
        raise UnsupportedModelError(
            f"{what} with several active adapters, of which one is DoRA: their magnitudes scale W0 once each, and no bound "
            "is proven for that. Activate one adapter: model.set_adapter(name)."
        )


def active(layer: Any) -> list[str]:
    """Names of the active adapters that this layer has."""
    held = next(getattr(layer, n) for n in ("lora_A", "oft_R", "hra_u") if hasattr(layer, n))
    return [a for a in layer.active_adapters if a in held]


def refuse_merged(name: str, layer: Any) -> None:
    """Raise TrainerError for a layer whose adapters are merged into W0."""
    if layer.merged:
        raise TrainerError(
            f"{name}: adapters are merged into W0. Call model.unmerge_adapter() first."
        )


def parameters_of(layer: Any, adapter: str, kind: str) -> list[tuple[str, Tensor]]:
    """(name relative to the layer, tensor) of everything that one adapter trains here."""
    if kind == OFT:
        return [(f"oft_R.{adapter}", layer.oft_R[adapter].weight)]
    if kind == HRA:
        return [(f"hra_u.{adapter}", layer.hra_u[adapter])]
    found = [(f"lora_{x}.{adapter}", getattr(layer, f"lora_{x}")[adapter].weight) for x in "AB"]
    if kind == DORA:
        found.append(
            (f"lora_magnitude_vector.{adapter}", layer.lora_magnitude_vector[adapter].weight)
        )
    return found


def base_weight(layer: Any) -> Tensor:
    """W0 in storage orientation, dequantized where it has to be; the very Parameter's values where it is plain."""
    base = layer.base_layer
    weight = None if is_linear(base) else dequantized(base)
    return base.weight.detach() if weight is None else weight


def with_deltas(layer: Any, adapters: list[str], dtype: torch.dtype) -> Tensor:
    """W0 + sum of s B A over these LoRA adapters, in storage orientation."""
    weight, transposed = base_weight(layer).to(dtype), is_transposed(layer.base_layer)
    for a in adapters:
        delta = layer.lora_B[a].weight.detach().to(dtype) @ layer.lora_A[a].weight.detach().to(
            dtype
        )
        weight = weight + (delta.T if transposed else delta) * layer.scaling[a]
    return weight


@torch.no_grad()
def merged_weight(layer: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weight that an adapted layer computes with, in its base layer's storage orientation; a new tensor.

    W0 as stored if its adapters are merged already or disabled.
    """
    wrapped: Any = layer
    if wrapped.merged or wrapped.disable_adapters:
        return base_weight(wrapped).to(dtype).clone()
    kind, names = kind_of(wrapped), active(wrapped)
    if kind in TURNING:
        weight = base_weight(wrapped).to(dtype)
        stored_transposed = is_transposed(wrapped.base_layer)
        for a in reversed(names) if kind == OFT else names:
            turn = _turn(wrapped, a, str(kind), dtype)
            weight = turn @ weight if stored_transposed else weight @ turn.T
        return weight.clone()
    weight = with_deltas(wrapped, names, dtype)
    if kind == DORA:
        dim = 0 if is_transposed(wrapped.base_layer) else 1
        sizes = torch.linalg.vector_norm(weight, dim=dim, keepdim=True)
        magnitude = wrapped.lora_magnitude_vector[names[0]].weight.detach().to(dtype)
        weight = weight / sizes * magnitude.unsqueeze(dim)
    return weight.clone()


def _turn(layer: Any, adapter: str, kind: str, dtype: torch.dtype) -> Tensor:
    """The matrix R [d_in, d_in] that x is multiplied with from the left before W0: y = W0 (R^T x), orthogonal."""
    if kind == HRA:
        u = layer.hra_u[adapter].detach().to(dtype)
        eye = torch.eye(len(u), dtype=dtype, device=u.device)
        if layer.hra_apply_GS[adapter]:
            q, _ = torch.linalg.qr(u)
            return eye - 2.0 * q @ q.T
        product = eye
        for column in (u / u.norm(dim=0)).unbind(1):
            product = product - 2.0 * torch.outer(product @ column, column)
        return product.T
    oft = layer.oft_R[adapter]
    weight = oft.weight.detach().to(dtype)
    if oft.coft:  # its forward pulls the weight towards zero first, and keeps it there
        weight = oft._project_batch(weight, eps=oft.eps)
    skew = oft._pytorch_skew_symmetric(weight, oft.block_size)
    eye = torch.eye(oft.block_size, dtype=dtype, device=skew.device).expand_as(skew)
    turns = torch.linalg.solve(eye + skew, eye - skew, left=False)
    count = oft.in_features // oft.block_size if oft.block_share else oft.r
    return torch.block_diag(
        *(turns[0] if oft.block_share else t for t in turns.expand(count, -1, -1))
    ).clone()


def saved_module(module: nn.Module) -> nn.Module | None:
    """Of modules_to_save (a classifier's head, say): the copy that runs now, or the original; None for any other module."""
    wrapper: Any = module
    if (
        f"{type(module).__module__}.{type(module).__qualname__}"
        != "peft.utils.other.ModulesToSaveWrapper"
    ):
        return None
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    held = wrapper.modules_to_save  # of other adapters, perhaps
    return next(
        (held[name] for name in wrapper.active_adapters[:1] if name in held),
        wrapper.original_module,
    )


def adapter_facts(module: nn.Module) -> str:
    """What the merged weight of an adapted layer depends on besides Parameters; empty for any other module."""
    layer: Any = module
    if saved_module(module) is not None:
        return (
            f"saved copy of {layer.active_adapters}"
            if not layer.disable_adapters
            else "the original"
        )
    try:
        kind = kind_of(layer)
    except UnsupportedModelError:
        return ""
    if kind is None:
        return ""
    if layer.merged or layer.disable_adapters:
        return "merged" if layer.merged else "adapters disabled"
    found = []
    for name in active(layer):
        what = f"{name}: {kind}"
        if kind in (LORA, DORA):
            what += f" scaling={layer.scaling[name]!r}"
        if kind == HRA:
            what += f" orthogonalized={layer.hra_apply_GS[name]!r}"
        if kind == OFT:
            oft = layer.oft_R[name]
            what += f" coft={oft.coft} eps={oft.eps!r} block_share={oft.block_share}"
        found.append(what)
    return ", ".join(found)


def read_weight(module: nn.Module) -> Tensor | None:
    """For the certificate: the merged weight of an adapted layer, None for any other module.

    Raises UnsupportedModelError for adapters whose function is not that of one weight.
    """
    layer: Any = module
    try:
        if kind_of(layer) is None:
            return None
    except UnsupportedModelError:
        return None
    refuse_function(layer)
    if entry_cap(layer.base_layer) is not None:
        _refuse_place("this layer", layer, held=True)
    biased = hasattr(layer, "lora_B") and any(
        layer.lora_B[a].bias is not None for a in active(layer)
    )
    if biased and not (layer.merged or layer.disable_adapters):
        raise UnsupportedModelError(
            "A LoRA with lora_bias=True adds to the bias, which is not certified yet."
        )
    return merged_weight(layer)
