"""peft's layers: which kinds there are, and which weight each one multiplies with.

    LoRA, rslora    W0 + s B A              several active adapters add up
    DoRA            diag(m / rows(V)) V     V = W0 + s B A; one active adapter
    OFT, COFT       W0 R^T                  R is orthogonal, block by block the Cayley transform of
                                            a skew matrix
    HRA             W0 H_1 H_2 ...          reflections, which are orthogonal

rows(V) are the 2-norms of the rows of V. The last two kinds turn what enters W0 and change the
norm of no block of rows. So they need no projection to stay within a cap.

The layers are recognized by their attributes; peft is never imported.
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
BUDGET = "lip_budget"  # name of the attribute in which a layer keeps its budget; see budget.py


def kind_of(layer: Any) -> str | None:
    """Which of the four kinds a layer is.

    Returns:
        LORA, DORA, OFT or HRA, or None for a module that wraps no layer.

    Raises:
        UnsupportedModelError: the layer is of another tuner.
    """
    if not isinstance(getattr(layer, "base_layer", None), nn.Module):
        return None
    if hasattr(layer, "oft_R"):
        return OFT
    if hasattr(layer, "hra_u"):
        return HRA
    if not hasattr(layer, "lora_A"):
        raise UnsupportedModelError(
            f"{type(layer).__module__}.{type(layer).__name__} has no rule here: its weight's norm "
            "is neither kept by itself (as by OFT and HRA) nor by a projection (as with LoRA). Use "
            "LoraConfig, OFTConfig or HRAConfig."
        )
    magnitudes = getattr(layer, "lora_magnitude_vector", None) or ()
    return DORA if any(a in magnitudes for a in active(layer)) else LORA


def wrapped_layers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Find every layer that an adapter wraps, and whose weight can be held.

    Yields:
        (name, layer, kind).

    Raises:
        UnsupportedModelError: an adapter has no rule. The message names it and says what to do.
    """
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Module):
            continue
        held = isinstance(base, Constrained) or BUDGET in module.__dict__
        if not hasattr(module, "lora_A") and not held:
            continue  # another library wraps this layer, and it has neither cap nor budget
        try:
            kind = kind_of(module)
            refuse_function(module)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{name} is wrapped by {error}") from None
        assert kind is not None
        _refuse_place(name, module, held)
        yield name, module, kind


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the LoRA and DoRA layers among `wrapped_layers`."""
    return ((name, layer) for name, layer, kind in wrapped_layers(model) if kind not in TURNING)


def _refuse_place(name: str, layer: Any, held: bool) -> None:
    """Raise UnsupportedModelError for an adapter in a place where nothing can be held."""
    base = layer.base_layer
    if len(getattr(layer, "lora_embedding_A", ())):
        raise UnsupportedModelError(
            f"{name}: LoRA on an embedding has no projection here, and its rows are capped. Leave "
            "the embedding out of target_modules."
        )
    if not held or hasattr(layer, "parameter_name"):
        raise UnsupportedModelError(
            f"{name}: LoRA on {type(base).__name__}, which has no cap. Order: retrofit(model), "
            "then get_peft_model; target linear layers that the retrofit's report lists. Without a "
            "retrofit, bound the change: constrain_adapters(model, budget=0.1, relative=True)."
        )
    if entry_cap(base) is not None:
        raise UnsupportedModelError(
            f"{name}: its output is capped entrywise (gate_max), and an adapter adds behind the "
            "cap. Leave this layer out of target_modules, or retrofit with gate_max=None."
        )


def refuse_function(layer: Any) -> None:
    """Raise UnsupportedModelError for an adapter that is not in the table of this file's head."""
    kind = kind_of(layer)
    what = f"{type(layer).__module__}.{type(layer).__name__}"
    if kind == OFT:
        if any(layer.oft_R[a].use_cayley_neumann for a in active(layer)):
            raise UnsupportedModelError(
                f"{what} with use_cayley_neumann=True, a truncated series that is not orthogonal "
                "and lengthens the weight. Use OFTConfig(use_cayley_neumann=False)."
            )
        return
    if kind == HRA:
        return
    variants = getattr(layer, "lora_variant", None) or {}
    odd = [v for a, v in variants.items() if a in active(layer) and "Dora" not in type(v).__name__]
    if odd or hasattr(layer, "lora_E"):
        raise UnsupportedModelError(
            f"{what}, a variant of LoRA ({type(odd[0]).__name__ if odd else 'AdaLoRA'}) that "
            "computes another weight than W0 + s B A. Use a plain LoraConfig, or use_dora=True."
        )
    if kind == DORA and len(active(layer)) > 1:
        raise UnsupportedModelError(
            f"{what} with several active adapters, of which one is DoRA: their magnitudes scale W0 "
            "once each, and no bound is proven for that. Activate one adapter: "
            "model.set_adapter(name)."
        )


def active(layer: Any) -> list[str]:
    """The names of the active adapters that this layer has."""
    held = next(getattr(layer, n) for n in ("lora_A", "oft_R", "hra_u") if hasattr(layer, n))
    return [a for a in layer.active_adapters if a in held]


def refuse_merged(name: str, layer: Any) -> None:
    """Raise TrainerError for a layer whose adapters are merged into W0."""
    if layer.merged:
        raise TrainerError(
            f"{name}: adapters are merged into W0. Call model.unmerge_adapter() first."
        )


def parameters_of(layer: Any, adapter: str, kind: str) -> list[tuple[str, Tensor]]:
    """(name relative to the layer, tensor) of everything that one adapter trains in this layer."""
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
    """W0 in storage orientation, dequantized if need be.

    If it is plain, the result shares the Parameter's memory.
    """
    base = layer.base_layer
    weight = None if is_linear(base) else dequantized(base)
    return base.weight.detach() if weight is None else weight


def with_deltas(layer: Any, adapters: list[str], dtype: torch.dtype) -> Tensor:
    """W0 + the sum of s B A over these LoRA adapters, in storage orientation."""
    weight, transposed = base_weight(layer).to(dtype), is_transposed(layer.base_layer)
    for a in adapters:
        delta = layer.lora_B[a].weight.detach().to(dtype) @ layer.lora_A[a].weight.detach().to(
            dtype
        )
        weight = weight + (delta.T if transposed else delta) * layer.scaling[a]
    return weight


@torch.no_grad()
def merged_weight(layer: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    """Compute the weight that an adapted layer multiplies with.

    If its adapters are merged already, or disabled, that is W0 as it is stored.

    Returns:
        A new tensor of this dtype, in the base layer's storage orientation.
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
    """The orthogonal matrix R [d_in, d_in] of an adapter that computes y = W0 (R^T x)."""
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
    if oft.coft:  # the forward of COFT first projects the weight towards zero, as here
        weight = oft._project_batch(weight, eps=oft.eps)
    skew = oft._pytorch_skew_symmetric(weight, oft.block_size)
    eye = torch.eye(oft.block_size, dtype=dtype, device=skew.device).expand_as(skew)
    turns = torch.linalg.solve(eye + skew, eye - skew, left=False)
    count = oft.in_features // oft.block_size if oft.block_share else oft.r
    return torch.block_diag(
        *(turns[0] if oft.block_share else t for t in turns.expand(count, -1, -1))
    ).clone()


def saved_module(module: nn.Module) -> nn.Module | None:
    """The layer that runs in place of one of peft's modules_to_save (a classifier's head, say).

    Returns:
        The copy that is active, or the original, or None for any other module.
    """
    wrapper: Any = module
    if (
        f"{type(module).__module__}.{type(module).__qualname__}"
        != "peft.utils.other.ModulesToSaveWrapper"
    ):
        return None
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    held = wrapper.modules_to_save  # it may hold copies of other adapters only
    return next(
        (held[name] for name in wrapper.active_adapters[:1] if name in held),
        wrapper.original_module,
    )


def adapter_facts(module: nn.Module) -> str:
    """What the merged weight of an adapted layer depends on besides Parameters, as text.

    It is empty for any other module.
    """
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
    """The merged weight of an adapted layer, for the certificate.

    Returns:
        The weight, or None for any other module.

    Raises:
        UnsupportedModelError: the layer computes something else than a product with one weight.
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
