"""Which projection keeps LoRA's W0 + s B A within its caps, or s B A within a budget, at what loss?

    python benchmarks/lora_projection.py [--seeds 3]       # minutes on a CPU, offline
    python benchmarks/lora_projection.py --smoke

A small constrained GPT is trained on the Python language reference (English). Then it is fine-tuned
with LoRA r = 8 and AdamW on the source of the standard library, once with each way. `kept` is how
much of the change that a step wanted is left, inner(got, wanted) / norm(wanted)^2, in the last
step, for all layers together.

    none      no constraint: what caps cost
    scale     the largest t in [0, 1] with norm(W0 + t s B A) <= cap, for every block
    clip      singular values of s B A clipped at cap - norm(W0)
    filter    ours: Z(l) of lip_plugin/linalg/low_rank.py
    nearest   Dykstra's projection with full SVDs: the best there is, at a price
    budget    singular values of s B A clipped at the budget, A as it is (ours)
    balanced  the same product from rebalanced factors: B = U sqrt(S), A = sqrt(S) V^T (FedSVD's)
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from common import (
    Table,
    character_gpt2,
    encode,
    finish,
    headline,
    machine,
    parsed,
    parser,
    read_text,
    recipe,
    timed,
    windows,
)
from torch import Tensor

from lip_plugin import LipschitzMuon, constrain_adapters, retrofit, set_caps_
from lip_plugin.integrations.peft.enforce import merged_block_norms, project_adapters
from lip_plugin.integrations.peft.layers import lora_layers, merged_weight

LENGTH = 64


def sources() -> str:
    """Source text of a few modules of the standard library: the other language."""
    import argparse as a
    import collections as b
    import dataclasses as c
    import inspect as d
    import tarfile as e
    import typing as f

    return "".join(inspect.getsource(m) for m in (a, b, c, d, e, f))


def batches(ids: Tensor, count: int, size: int, seed: int) -> Any:
    """The same batches for every way with a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield windows(ids, LENGTH, size, generator)


def loss_of(model: Any, ids: Tensor) -> float:
    """The mean loss on the same sequences for every model."""
    with torch.no_grad():
        return statistics.mean(
            float(model(input_ids=b, labels=b).loss) for b in batches(ids, 8, 32, 99)
        )


def pretrained(text: Tensor, args: argparse.Namespace, size: int) -> Any:
    """A constrained model that was trained on a text."""
    torch.manual_seed(0)
    model = character_gpt2(size, 64, 2, LENGTH)
    retrofit(model, recipe())
    optimizer = LipschitzMuon(model, lr=0.1)
    for step, batch in enumerate(batches(text, args.pretrain, 32, 1)):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / args.pretrain) + 1e-4
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def changed_blocks(layer: Any) -> Any:
    """Every block of a layer with one adapter.

    Gives the rows of B, the block of W0, A, B, s, and the cap as a spectral norm.
    """
    base = layer.base_layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    matrix = base.layout.matrix(base.weight.detach())
    for s in base.layout.segments:
        for i in range(s.count):
            rows = slice(s.start + i * s.d_out, s.start + (i + 1) * s.d_out)
            yield (
                rows,
                matrix[rows].double(),
                a.double(),
                b,
                layer.scaling["default"],
                s.cap * math.sqrt(s.d_out / matrix.shape[1]),
            )


def scale(w: Tensor, change: Tensor, cap: float) -> Tensor:
    """The way `scale`, by bisection."""
    low, high = 0.0, 1.0
    if float(torch.linalg.matrix_norm(w + change, 2)) <= cap:
        return change
    for _ in range(20):
        middle = 0.5 * (low + high)
        inside = float(torch.linalg.matrix_norm(w + middle * change, 2)) <= cap * (1 + 5e-5)
        low, high = (middle, high) if inside else (low, middle)
    return low * change


def clip(w: Tensor, change: Tensor, cap: float) -> Tensor:
    """The way `clip`."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return (u * s.clamp(max=max(0.0, cap - float(torch.linalg.matrix_norm(w, 2))))) @ v


def nearest(w: Tensor, change: Tensor, cap: float) -> Tensor:
    """The way `nearest`."""
    if float(torch.linalg.matrix_norm(w + change, 2)) <= cap:
        return change
    q = torch.linalg.svd(change, full_matrices=False)[2][:16]
    onto, carry = q.T @ q, torch.zeros_like(w)
    for _ in range(60):
        u, s, v = torch.linalg.svd(w + change + carry, full_matrices=False)
        clipped = (u * s.clamp(max=cap)) @ v
        carry, change = w + change + carry - clipped, (clipped - w) @ onto
    return scale(w, change, cap)


@torch.no_grad()
def by_svd(way: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Any], None]:
    """A projection of all adapters, from a way to project the change of one block."""

    def project(model: Any) -> None:
        for _, layer in lora_layers(model):
            for rows, w, a, b, s, cap in changed_blocks(layer):
                change = way(w, s * b[rows].double() @ a, cap)
                b[rows] = (change @ torch.linalg.pinv(a) / s).to(b.dtype)

    return torch.no_grad()(project)


@torch.no_grad()
def balance(model: Any) -> None:
    """The same products from balanced factors."""
    for _, layer in lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        u, sizes, v = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
        k = a.shape[0]
        if float(sizes[0]) > 0:
            # A zero factor would never move again.
            floor = sizes[:k].clamp_min(1e-4 * float(sizes[0])).sqrt()
            b.copy_(u[:, :k] * (sizes[:k] / floor))
            a.copy_(floor[:, None] * v[:k])


def budgeted(model: Any, balanced: bool) -> None:
    """The ways `budget` and `balanced`."""
    project_adapters(model)
    if balanced:
        balance(model)


def run(
    base: Any,
    way: str,
    w_max: float,
    text: Tensor,
    other: Tensor,
    seed: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Fine-tune the base in one way; a row of the table."""
    model = copy.deepcopy(base)
    set_caps_(model, None, w_max=w_max)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    model = peft.get_peft_model(model, config)
    if way in ("budget", "balanced"):
        set_caps_(model, None, w_max=1e6)  # the budget alone
        constrain_adapters(model, args.budget)
    project = {
        "none": lambda m: None,
        "filter": project_adapters,
        "scale": by_svd(scale),
        "clip": by_svd(clip),
        "nearest": by_svd(nearest),
        "budget": lambda m: budgeted(m, False),
        "balanced": lambda m: budgeted(m, True),
    }[way]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    seconds, share = [], math.nan
    for step, batch in enumerate(batches(text, args.steps, 32, 10 + seed)):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = step == args.steps - 1
        wanted = changes(model) if last else []
        seconds.append(timed(lambda: project(model)).wall)
        if last:
            pairs = list(zip(changes(model), wanted, strict=True))
            share = sum(float((g * w).sum()) for g, w in pairs) / sum(
                float((w * w).sum()) for _, w in pairs
            )
    norms = [b.worst_over_cap for b in merged_block_norms(model) if not b.name.endswith("(change)")]
    return {
        "way": way,
        "w_max": w_max,
        "loss": loss_of(model, text),
        "old_loss": loss_of(model, other),
        "kept": share,
        "worst_norm": max(norms) * (1e6 if way in ("budget", "balanced") else w_max),
        "ms": 1e3 * statistics.median(seconds),
    }


def changes(model: Any) -> list[Tensor]:
    """s B A of each layer."""
    return [
        merged_weight(layer) - layer.base_layer.weight.detach().double()
        for _, layer in lora_layers(model)
    ]


def main() -> None:
    made = parser(
        __doc__,
        pretrain=(1500, "steps on the first text"),
        steps=(300, "steps with LoRA"),
        lr=(3e-3, "of AdamW"),
        budget=(0.3, "RMS->RMS norm that a block may change by"),
        seeds=(1, "medians over so many runs"),
    )
    made.add_argument(
        "--ways", nargs="*", help="of those above; all by default (nearest takes most of the time)"
    )
    args = parsed(made, pretrain=5, steps=2)
    where = machine("cpu", "peft")
    headline("ways to keep LoRA within caps", where)
    english, python = read_text(None), sources()
    vocabulary = sorted(set(english))
    old, new = encode(english, vocabulary), encode(python, vocabulary)
    base = pretrained(old, args, len(vocabulary))
    start = {"new": loss_of(base, new), "old": loss_of(base, old)}
    print(f"base: loss {start['old']:.3f} on its own text, {start['new']:.3f} on the new one")
    table = Table(
        *(("way", "<8"), ("cap", "5g"), ("new text", "8.3f"), ("old text", "8.3f")),
        *(("kept", "6.3f"), ("worst norm", "10.3f"), ("ms/step", "8.1f")),
    )
    rows = []
    plans = [
        ("none", 1.0),
        *((way, cap) for cap in (1.0, 1.2) for way in ("scale", "clip", "filter", "nearest")),
    ]
    plans += [("budget", 1.0), ("balanced", 1.0)]
    for way, cap in plans:
        if args.ways and way not in args.ways:
            continue
        found = [run(base, way, cap, new, old, seed, args) for seed in range(args.seeds)]
        row = {
            k: v if isinstance(v, str) else statistics.median(f[k] for f in found)
            for k, v in found[0].items()
        }
        table.row(*row.values())
        rows.append({**row, "losses": [f["loss"] for f in found]})
    about = {key: getattr(args, key) for key in ("seeds", "steps", "budget", "lr", "smoke")}
    finish("lora_projection", where, base=start, rows=rows, **about)


if __name__ == "__main__":
    main()
