"""What does rounding the linear layers to float8 cost, under caps and without?

    python benchmarks/low_precision.py                # on the Python language reference
    python benchmarks/low_precision.py --text FILE
    python benchmarks/low_precision.py --smoke

Two twins of the same GPT-2 shape are trained for the same steps on the same batches of characters.
One is retrofitted (no norms, caps) under LipschitzMuon. The other is stock (LayerNorm) under AdamW,
at the better of two learning rates. Then the weight and the input of every linear layer are rounded
to a format, while the product is exact in float32. Plain rounding casts numbers as they are, and
saturates at the largest number of the format. `amax` first divides each tensor by its largest
entry, which a real system has to measure at every step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import (
    Table,
    character_gpt2,
    characters,
    finish,
    fit,
    headline,
    machine,
    own_loss,
    parsed,
    parser,
    recipe,
    windows,
)
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lip_plugin import LipschitzMuon, activation_report, certify, retrofit

FORMATS = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
RATES = (1e-3, 3e-3)


def parse() -> argparse.Namespace:
    made = parser(
        __doc__,
        text=True,
        steps=300,
        length=64,
        width=96,
        layers=3,
        w_max=2.0,
        head_max=(8.0, "cap on the output head"),
        attention_scale=(4.0, "attention logits are this times q.k / d_head"),
        lr=0.1,
        sequences=(128, "validation sequences"),
    )
    return parsed(made, steps=5, width=32, length=16, sequences=4)


def fresh(vocabulary: int, options: argparse.Namespace) -> GPT2LMHeadModel:
    """The model before training, the same for both twins."""
    torch.manual_seed(0)
    sizes = (vocabulary, options.width, options.layers, options.length)
    model = character_gpt2(*sizes, tie_word_embeddings=False)
    model.loss_type = "ForCausalLM"  # said outright: the default warns
    return model


def train(
    model: GPT2LMHeadModel,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    options: argparse.Namespace,
) -> GPT2LMHeadModel:
    """The same batches for every model; the rate falls to zero."""
    generator = torch.Generator().manual_seed(1)
    return fit(
        model,
        optimizer,
        options.steps,
        lambda: windows(ids, options.length, 24, generator),
        clip=1.0,
    )


@torch.no_grad()
def loss_of(model: nn.Module, batches: list[Tensor]) -> float:
    losses = [float(own_loss(model, b)) for b in batches]
    return sum(losses) / len(losses)


def rounded(x: Tensor, dtype: torch.dtype, amax: bool) -> Tensor:
    """x as the format holds it, saturating, in x's own dtype.

    Args:
        amax: scale its largest entry to the top of the format before, and back after.
    """
    top = torch.finfo(dtype).max
    scale = x.abs().amax().clamp_min(1e-30) / top if amax else torch.ones(())
    return (x / scale).clamp(-top, top).to(dtype).to(x.dtype) * scale


def linears(model: nn.Module) -> Iterator[nn.Module]:
    """All linear layers of a model."""
    return (m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)))


@contextmanager
def rounding(model: nn.Module, cast: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within: every linear layer's weight and input pass through `cast`."""
    kept = [(m, m.weight.detach().clone()) for m in linears(model)]
    handles = [
        m.register_forward_pre_hook(lambda m, args: (cast(args[0]), *args[1:])) for m, _ in kept
    ]
    try:
        with torch.no_grad():
            for module, weight in kept:
                module.weight.copy_(cast(weight))
        yield
    finally:
        with torch.no_grad():
            for module, weight in kept:
                module.weight.copy_(weight)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def largest_seen(model: nn.Module, batches: list[Tensor]) -> float:
    """Largest absolute entry that enters a linear layer."""
    seen = [0.0]

    def look(module: nn.Module, args: tuple) -> None:
        seen.append(float(args[0].abs().amax()))

    handles = [m.register_forward_pre_hook(look) for m in linears(model)]
    loss_of(model, batches)
    for handle in handles:
        handle.remove()
    return max(seen)


def increases(model: nn.Module, batches: list[Tensor]) -> tuple[float, dict[str, float]]:
    """Validation loss in float32, and what each format adds to it, in nats."""
    plain, added = loss_of(model, batches), {}
    for name, dtype in FORMATS.items():
        for amax in (False, True) if "float8" in name else (False,):
            with rounding(model, lambda x, d=dtype, a=amax: rounded(x, d, a)):
                added[name + (" amax" if amax else "")] = loss_of(model, batches) - plain
    return plain, added


def main() -> None:
    options = parse()
    where = machine()
    headline("float8 under caps and without", where)
    began = time.perf_counter()
    text = characters(options.text)
    size = len(text.vocabulary)
    held_out = text.held_out[: options.sequences * options.length].view(-1, options.length)
    batches = list(held_out.split(32))
    constrained = fresh(size, options)
    config = recipe(
        w_max=options.w_max,
        overrides={"lm_head": options.head_max},
        logit_scale=1.0,
        biases="drop",
        attention_scale=options.attention_scale,
    )
    retrofit(constrained, config)
    train(constrained, LipschitzMuon(constrained, lr=options.lr), text.train, options)
    stock = []
    for rate in RATES:
        model = fresh(size, options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        stock.append(train(model, optimizer, text.train, options))
    twins = {"constrained": constrained, "stock": min(stock, key=lambda m: loss_of(m, batches))}
    results = {}
    for name, model in twins.items():
        plain, added = increases(model, batches)
        proven = max(row.proven for row in activation_report(model, batches[0]).rows)
        results[name] = {
            "loss": plain,
            "added": added,
            "largest_input_seen": largest_seen(model, batches),
            "largest_activation_proven": proven,
            "log10_lipschitz": certify(model).log10_lipschitz,
        }
    show(results)
    about = {k: v for k, v in vars(options).items() if k != "text"}
    seconds = time.perf_counter() - began
    finish("low_precision", where, options=about, results=results, seconds=seconds)


def show(results: dict[str, dict[str, Any]]) -> None:
    """The twins side by side."""
    table = Table(("", "<34"), *((name, "12.4g") for name in results))
    for key in ("loss", "largest_input_seen", "largest_activation_proven", "log10_lipschitz"):
        table.row(key, *(found[key] for found in results.values()))
    for key in next(iter(results.values()))["added"]:
        added = (f"{found['added'][key]:.5f}" for found in results.values())
        table.row(f"loss added by {key}", *added)


if __name__ == "__main__":
    main()
