"""What rounding the linear layers to float8 costs: a constrained character model against its unconstrained twin.

    python benchmarks/low_precision.py                # trains both on the Python language reference, then rounds
    python benchmarks/low_precision.py --text FILE
    python benchmarks/low_precision.py --smoke

Both twins are the same GPT-2 shape, trained for the same steps on the same batches: one retrofitted (no norms, caps)
under LipschitzMuon, one stock (LayerNorm) under AdamW at the better of two learning rates. Then the weight and
the input of every linear layer are rounded to a format, the product being exact in float32. Scale 1 casts them as they are, and
saturates at the largest number of the format; amax divides each tensor by its largest entry first, which a
real system has to measure at every step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lip_plugin import LipschitzConfig, LipschitzMuon, activation_report, certify, retrofit

FORMATS = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
RATES = (1e-3, 3e-3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", help="a text file; the Python language reference without")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    for name, default, text in (
        ("steps", 300, "optimizer steps"),
        ("length", 64, "characters in a sequence"),
        ("width", 96, "of the model"),
        ("layers", 3, "of the model"),
        ("w-max", 2.0, "cap on every block, RMS->RMS norm"),
        ("head-max", 8.0, "cap on the output head"),
        ("attention-scale", 4.0, "attention logits are this times q.k / d_head"),
        ("lr", 0.1, "RMS->RMS norm per step"),
        ("sequences", 128, "validation sequences"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.width, options.length, options.sequences = 5, 32, 16, 4
    return options


def fresh(vocabulary: int, options: argparse.Namespace) -> GPT2LMHeadModel:
    sizes = {
        "n_embd": options.width,
        "n_layer": options.layers,
        "n_head": 4,
        "n_positions": options.length,
    }
    nothing = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    nothing |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    config = GPT2Config(vocab_size=vocabulary, **sizes, **nothing, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
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
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0 - s / options.steps)
    for _ in range(options.steps):
        at = torch.randint(len(ids) - options.length, (24,), generator=generator)
        batch = torch.stack([ids[i : i + options.length] for i in at])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def loss_of(model: nn.Module, batches: list[Tensor]) -> float:
    losses = [float(model(b, labels=b).loss) for b in batches]
    return sum(losses) / len(losses)


def rounded(x: Tensor, dtype: torch.dtype, amax: bool) -> Tensor:
    """x as the format holds it, saturating, in x's own dtype; amax: after scaling its largest entry to the top."""
    top = torch.finfo(dtype).max
    scale = x.abs().amax().clamp_min(1e-30) / top if amax else torch.ones(())
    return (x / scale).clamp(-top, top).to(dtype).to(x.dtype) * scale


def linears(model: nn.Module) -> Iterator[nn.Module]:
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
    began = time.perf_counter()
    text = Path(options.text).read_text() if options.text else "\n".join(topics.topics.values())
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[c] for c in text])
    cut = int(0.9 * len(ids))
    held_out = (
        ids[cut : cut + options.sequences * options.length].view(-1, options.length).split(32)
    )
    batches = list(held_out)
    constrained = fresh(len(index), options)
    config = LipschitzConfig(
        w_max=options.w_max,
        overrides={"lm_head": options.head_max},
        logit_scale=1.0,
        biases="drop",
        attention_scale=options.attention_scale,
    )
    retrofit(constrained, config)
    train(constrained, LipschitzMuon(constrained, lr=options.lr), ids[:cut], options)
    stock = []
    for rate in RATES:
        model = fresh(len(index), options)
        stock.append(
            train(model, torch.optim.AdamW(model.parameters(), lr=rate), ids[:cut], options)
        )
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
    report(results, options, time.perf_counter() - began)


def report(results: dict[str, dict], options: argparse.Namespace, seconds: float) -> None:
    print(f"{'':<34}" + "".join(f"{name:>14}" for name in results))
    for key in ("loss", "largest_input_seen", "largest_activation_proven", "log10_lipschitz"):
        print(f"{key:<34}" + "".join(f"{r[key]:>14.4g}" for r in results.values()))
    for key in next(iter(results.values()))["added"]:
        print(
            f"{'loss added by ' + key:<34}"
            + "".join(f"{r['added'][key]:>14.5f}" for r in results.values())
        )
    print(
        json.dumps(
            {
                "benchmark": "low_precision",
                "options": {k: v for k, v in vars(options).items() if k != "text"},
                "results": results,
                "seconds": seconds,
                "device": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
            }
        )
    )


if __name__ == "__main__":
    main()
