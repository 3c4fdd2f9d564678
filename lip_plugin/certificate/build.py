"""model -> graph: an executable copy of its structure, which shares its weights, and their norms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.architecture import Family, LayerParts, Parts, find_family, parts
from lip_plugin.blocks import RMS_TO_RMS, Layout, Segment
from lip_plugin.certificate.attention import Attention, Projection
from lip_plugin.certificate.graph import (
    Activation,
    Chain,
    Gate,
    Linear,
    LinearNorms,
    Node,
    Norm,
    Norms,
    Residual,
    Scale,
)
from lip_plugin.certificate.upper import add, div, mul, norm2, root, up
from lip_plugin.errors import CertificateError, UnsupportedModelError
from lip_plugin.linalg.norms import row_rms_max_upper, sigma_max_upper
from lip_plugin.modules import (
    ConstantScale,
    Constrained,
    activation_kind,
    branch_scale,
    is_linear,
    is_transposed,
)
from lip_plugin.optim.batches import batches
from lip_plugin.surgery import find_retrofit, head_dim, linear_layout

# Readers of what a wrapped linear layer really multiplies with (an adapter's merged weight, stored
# like the base layer's); they return None for a layer that is not theirs.
_WEIGHT_READERS: list[Callable[[nn.Module], Tensor | None]] = []


def register_weight_reader(reader: Callable[[nn.Module], Tensor | None]) -> None:
    """Have the certificate read the weight of wrapped linear layers by `reader(module)`."""
    if reader not in _WEIGHT_READERS:
        _WEIGHT_READERS.append(reader)


@dataclass
class Graph:
    """A model as nodes, from the embeddings that enter the first block to the logits."""

    root: nn.Module
    family: Family
    parts: Parts
    body: Chain

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """What enters the first block for token ids [batch, tokens]."""
        x = self.root.get_submodule(self.parts.tokens).weight[ids].to(dtype)  # type: ignore[index]
        if self.parts.positions:
            positions = self.root.get_submodule(self.parts.positions).weight[: ids.shape[1]]  # type: ignore[index]
            x = x + positions.to(dtype)
        return x

    def tables(self) -> list[str]:
        """Names of the embedding tables whose rows add up to the input of the first block."""
        return [t for t in (self.parts.tokens, self.parts.positions) if t]

    def linears(self) -> list[tuple[str, str, nn.Module, Tensor]]:
        """(role, name, plain base module, effective weight as stored) of every linear map."""
        found = []
        for role, name in self.parts.linears():
            module, weight = _read(self.root.get_submodule(name), name)
            found.append((role, name, module, weight()))
        return found


def build(model: nn.Module) -> Graph:
    """The graph of a model of a known family, retrofitted or not; wrappers are looked through.

    Raises UnsupportedModelError naming a module without a proven rule.
    """
    found = find_retrofit(model)
    root = found[0] if found else model
    family = find_family(root)
    names = parts(root, family.architecture)
    nodes: list[Node] = []
    for layer in names.layers:
        nodes.append(_attention_block(root, family, names, layer))
        nodes.append(_mlp_block(root, layer))
    nodes.append(_slot(root, names.final_norm))
    nodes.append(_linear(root, names.head))
    return Graph(root, family, names, Chain("model", nodes))


def _read(module: nn.Module, name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """(plain linear module, reader of the weight it multiplies with, in the plain module's storage)."""
    if is_linear(module):
        return module, lambda: module.weight  # type: ignore[return-value]
    base = getattr(module, "base_layer", None)
    for reader in _WEIGHT_READERS:
        if base is not None and is_linear(base) and reader(module) is not None:
            return base, lambda: reader(module)  # type: ignore[return-value]
    raise UnsupportedModelError(
        f"{name} is {type(module).__module__}.{type(module).__name__}: what it computes has no proven rule here. "
        "Merge adapters (merge_and_unload) or take the wrapper off, then certify."
    )


def _linear(root: nn.Module, name: str) -> Linear:
    base, weight = _read(root.get_submodule(name), name)
    transposed = is_transposed(base)
    d_in, d_out = base.weight.shape if transposed else tuple(reversed(base.weight.shape))  # type: ignore[union-attr,misc,arg-type]
    return Linear(
        name,
        weight=(lambda: weight().t()) if transposed else weight,
        bias=lambda: getattr(base, "bias", None),
        d_out=int(d_out),  # type: ignore[arg-type]
        d_in=int(d_in),  # type: ignore[arg-type]
    )


def _slot(root: nn.Module, name: str) -> Node:
    """The node of a norm slot: the constant it became, or the norm that was kept."""
    module: Any = root.get_submodule(name)
    if isinstance(module, ConstantScale):
        return Scale(name, module.scale)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    kind = type(module).__name__
    if type(module) is nn.LayerNorm:
        return Norm(name, module, float(module.eps), True, weight, bias)
    if kind == "LayerNorm" and eps is None:  # nanoGPT's, whose eps is a literal in its forward
        return Norm(name, module, 1e-5, True, weight, bias)
    if kind.endswith("RMSNorm") and eps is not None and bias is None:
        return Norm(name, module, float(eps), False, weight, None)
    raise UnsupportedModelError(f"{name} is {kind}, a norm without a proven rule here.")


def _attention_block(root: nn.Module, family: Family, names: Parts, layer: LayerParts) -> Residual:
    architecture = family.architecture.attention
    module: Any = root.get_submodule(layer.attention)
    d_head = head_dim(root, layer, names)
    heads = {"q": names.n_heads, "k": names.n_kv_heads, "v": names.n_kv_heads}
    projections = {}
    if "qkv" in layer.attention_linears:
        fused, start = _linear(root, layer.attention_linears["qkv"]), 0
        for role, count in heads.items():
            projections[role] = Projection(role, fused, start, start + count * d_head, count)
            start += count * d_head
    else:
        for role, count in heads.items():
            linear = _linear(root, layer.attention_linears[role])
            projections[role] = Projection(role, linear, 0, count * d_head, count)
    qk: list[Any] = [_slot(root, name) for name in layer.qk_norms] or [None, None]
    tau = float(getattr(module, architecture.scaling)) if architecture.scaling else 1.0 / math.sqrt(d_head)
    attention = Attention(
        layer.attention,
        projections["q"],
        projections["k"],
        projections["v"],
        tau=tau,
        d_head=d_head,
        d_in=projections["q"].linear.d_in,
        q_norm=qk[0],
        k_norm=qk[1],
        rotary=root.get_submodule(names.rotary) if names.rotary else None,
    )
    out = _linear(root, layer.attention_linears["out"])
    scale = Scale(layer.attention, branch_scale(module))
    return Residual(layer.attention, Chain(layer.attention, [_slot(root, layer.attention_norm), attention, out, scale]))


def _mlp_block(root: nn.Module, layer: LayerParts) -> Residual:
    act_module = root.get_submodule(layer.act)
    kind = activation_kind(act_module)
    if kind is None:
        raise UnsupportedModelError(f"{layer.act} is {act_module}: no proven slope is known for it.")
    act = Activation(layer.act, act_module, kind)
    up_map = _linear(root, layer.mlp_linears["up"])
    nodes: list[Node] = [_slot(root, layer.mlp_norm)]
    if "gate" in layer.mlp_linears:
        nodes.append(Gate(layer.mlp, _linear(root, layer.mlp_linears["gate"]), up_map, act))
    else:
        nodes += [up_map, act]
    nodes += [_linear(root, layer.mlp_linears["down"]), Scale(layer.mlp, branch_scale(root.get_submodule(layer.mlp)))]
    return Residual(layer.mlp, Chain(layer.mlp, nodes))


def weight_norms(graph: Graph) -> Norms:
    """Proven norms of the weights as they are: whole, per head, and per q, k, v; batched by shape."""
    linears = graph.linears()
    layouts = []
    for granularity in ("head", "matrix"):
        for role, _, module, _ in linears:
            layouts.append(linear_layout(module, role, 0.0, graph.parts, granularity))
    weights = [weight for *_, weight in linears]
    transposed = [layout.transposed for layout in layouts[: len(linears)]]
    for i, weight in enumerate(weights):
        rows = weight.shape[1 if transposed[i] else 0]
        layouts.append(Layout(RMS_TO_RMS, transposed[i], (Segment("all", 0, 1, rows, 0.0),)))
    sigma: list[dict[str, list[Decimal]]] = [{} for _ in layouts]
    for batch in batches(weights * 3, layouts):
        values = sigma_max_upper(batch.gather()).tolist()
        start = 0
        for view, owner, position in zip(batch.views, batch.owners, batch.positions):
            found = [up(v) for v in values[start : start + view.shape[0]]]
            sigma[owner][layouts[owner].segments[position].role] = found
            start += view.shape[0]
    n = len(linears)
    norms: Norms = {}
    for i, (_, name, module, weight) in enumerate(linears):
        matrix = weight.detach().t() if is_transposed(module) else weight.detach()
        row = mul(up(float(row_rms_max_upper(matrix))), root(up(matrix.shape[1])))
        whole = {role: values[0] for role, values in sigma[n + i].items()}
        norms[name] = LinearNorms(sigma[2 * n + i]["all"][0], row, whole, sigma[i])
    return norms


def cap_norms(graph: Graph) -> Norms:
    """The same bounds from the caps alone, so true after every step of a run.

    Raises CertificateError for a layer without a cap.
    """
    norms: Norms = {}
    for role, name, module, _ in graph.linears():
        layout = getattr(module, "layout", None)
        if layout is None or any(s.cap is None for s in layout.segments):
            raise CertificateError(f"{name} has no cap; certify(model, source='weights') measures it instead.")
        d_in = module.weight.shape[0 if layout.transposed else 1]  # type: ignore[union-attr,index,operator]
        heads = {s.role: s for s in linear_layout(module, role, 0.0, graph.parts, "head").segments}
        # a block's cap in RMS->RMS norm is a cap on sigma_max of cap * sqrt(d_out / d_in)
        sigma = {s.role: mul(up(s.cap), root(div(up(s.d_out), up(d_in)))) for s in layout.segments}  # type: ignore[operator,arg-type]
        whole = {s.role: norm2([sigma[s.role]] * s.count) for s in layout.segments}
        per_head = {r: [min(sigma[r], whole[r])] * s.count for r, s in heads.items()}
        total = norm2(whole.values())
        norms[name] = LinearNorms(total, max(sigma.values()), whole, per_head)
    return norms


def radius_of(graph: Graph, source: str) -> Decimal:
    """Bound on the token norm of the embeddings that enter the first block."""
    rows = []
    for name in graph.tables():
        module = graph.root.get_submodule(name)
        if source == "caps":
            if not isinstance(module, Constrained):
                raise CertificateError(f"{name} has no cap; certify(model, source='weights') measures it.")
            rows.append(up(module.layout.segments[0].cap))  # type: ignore[arg-type]
        else:
            rows.append(up(float(row_rms_max_upper(module.weight))))  # type: ignore[arg-type]
    return add(*rows)


def structure_of(graph: Graph) -> tuple:
    """Everything besides weights that the model's function depends on, as a value to compare."""
    root = graph.root
    modules = tuple(
        (name, type(m).__qualname__, m.extra_repr(), tuple(sorted(map(repr, _floats(m).items()))), len(m._forward_hooks))
        for name, m in root.named_modules()
    )
    scales = tuple(branch_scale(m) for m in root.modules())
    return modules, scales


def _floats(module: nn.Module) -> dict[str, float]:
    return {k: v for k, v in vars(module).items() if isinstance(v, float)}


@torch.no_grad()
def check_graph(graph: Graph, tokens: int = 16) -> float:
    """Compare the graph's forward with the model's own, on a copy with random weights, in float64.

    Random weights, because at a fresh start the branches are zero and would hide any mistake in
    them. Returns the largest difference over the largest logit. Raises CertificateError above 1e-4:
    libraries compute norms, softmax and rotations in float32 inside (1e-7 each), and a wrong
    structure differs by far more. The result is remembered while the structure stays the same.
    """
    structure = structure_of(graph)
    if graph.root.__dict__.get("lip_checked") == structure:
        return 0.0
    config = graph.root.config
    limits = [getattr(config, k, None) for k in ("sliding_window", "max_position_embeddings", "block_size")]
    tokens = min([tokens, *(int(v) for v in limits if v)])
    twin = _random_twin(graph.root)
    copied = build(twin)
    generator = torch.Generator().manual_seed(0)
    rows = twin.get_submodule(graph.parts.tokens).weight  # type: ignore[union-attr]
    ids = torch.randint(0, rows.shape[0], (2, tokens), generator=generator).to(rows.device)  # type: ignore[index,arg-type]
    expected = graph.family.logits(twin, ids).double()
    got = copied.body.run(copied.embed(ids, torch.float64))
    difference = float((got - expected).abs().max() / expected.abs().max())
    if not difference <= 1e-4:
        raise CertificateError(
            f"The graph of {type(graph.root).__name__} does not reproduce the model: logits differ by {difference:.2e} "
            "of their size. Something besides the described modules changes the forward pass (a hook, a patched "
            "attention, a softcap); a certificate of the graph would not be about this model."
        )
    graph.root.__dict__["lip_checked"] = structure
    return difference


def _random_twin(root: nn.Module) -> nn.Module:
    """Deep copy in float64 and eval mode with random weights of moderate norms."""
    twin = copy.deepcopy(root).double().eval()
    generator = torch.Generator().manual_seed(1)
    for p in twin.parameters():
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.dim() >= 2:
            values /= math.sqrt(min(p.shape[-2:])) / 2.0
        else:
            values = 1.0 + 0.1 * values
        p.copy_(values.to(p.device))
    return twin
