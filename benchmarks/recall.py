"""Associative recall: what can a model look up by content, at which proven bound?

    python benchmarks/recall.py                 # four runs, some minutes each on one thread
    python benchmarks/recall.py --steps 8000 --pairs 16
    python benchmarks/recall.py --smoke

A sequence holds pairs of a key and a value, then all its keys in another order, each followed by
its value: k1 v1 k2 v2 ... k2 v2 k1 v1 .... The loss and the accuracy are about the values in the
second half. Pairs are drawn anew for every sequence, so that nothing but a look-up finds them. It
is the task of arXiv 2312.04927 (multi-query associative recall). One value in `--pairs` is right by
chance for who knows which values are there. Bounds are at the network's own scale.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import Table, character_model, finish, headline, machine, parsed, parser
from torch import Tensor, nn
from tqdm import tqdm

from lip_plugin import LipschitzConfig, LipschitzMuon, certify, config_of, retrofit

# A sharp head that is not as quiet: found by hand for a bound of at most 10 (docs/LOG.md).
_LOUD = LipschitzConfig(
    attention_scale=(0.0, 64.0),
    value_scale=(1.0, 0.12),
    logit_scale=200.0,
    residual=(0.6, 0.2),
    method="soft_cap",
)
RUNS: dict[str, tuple[Any, float]] = {
    "no constraint, AdamW": (None, 3e-3),
    "accurate": ("accurate", 0.1),
    "content": ("content", 0.1),
    "content, bound of 10": (_LOUD, 0.05),
}


def drawn(count: int, pairs: int, words: int, generator: torch.Generator) -> Tensor:
    """Sequences [count, 4 * pairs]. Keys are 0 to words - 1, values words to 2 * words - 1."""
    keys = torch.rand(count, words, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(words, (count, pairs), generator=generator) + words
    order = torch.rand(count, pairs, generator=generator).argsort(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1)
    return torch.cat([torch.stack([keys, values], -1).flatten(1), asked.flatten(1)], 1)


def train(model: Any, optimizer: Any, options: argparse.Namespace, title: str) -> None:
    """Train with a warm-up of 50 steps, at a rate that then falls to zero in a straight line."""
    generator = torch.Generator().manual_seed(1)
    at = torch.arange(2 * options.pairs, 4 * options.pairs, 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 50) * (1.0 - s / options.steps)
    )
    model.train()
    for _ in tqdm(range(options.steps), desc=title, leave=False):
        ids = drawn(options.batch, options.pairs, options.words, generator)
        logits = model(ids).logits[:, at].flatten(0, 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, ids[:, at + 1].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: Any, options: argparse.Namespace) -> float:
    """The share of values that are right in 256 sequences that were not trained on."""
    ids = drawn(256, options.pairs, options.words, torch.Generator().manual_seed(2))
    at = torch.arange(2 * options.pairs, 4 * options.pairs, 2)
    found = model.eval()(ids).logits[:, at].argmax(-1)
    return float((found == ids[:, at + 1]).float().mean())


def measure(run: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model, and judge and prove it."""
    config, lr = RUNS[run]
    torch.manual_seed(0)
    model = character_model(
        "gpt2", 2 * options.words, options.width, options.layers, 4 * options.pairs
    )
    if config is None:
        optimizer: Any = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0
        )
    else:
        retrofit(model, config)
        optimizer = LipschitzMuon(model, lr=lr)
    train(model, optimizer, options, run)
    row = {"run": run, "lr": lr, "accuracy": accuracy(model, options)}
    if config is not None:
        scale = config_of(model).logit_scale or 1.0
        row["bound"] = certify(model).lipschitz / scale
        row["bound_from_caps"] = certify(model, "caps").lipschitz / scale
    return row


def main() -> None:
    made = parser(
        __doc__,
        steps=2000,
        pairs=(16, "keys and values in a sequence"),
        words=(32, "keys that there are, and values"),
        layers=2,
        width=64,
        batch=(32, "sequences in a step"),
        threads=1,
    )
    made.add_argument("--run", nargs="+", choices=RUNS, default=list(RUNS))
    options = parsed(made, steps=3, pairs=2, words=4, width=32)
    torch.set_num_threads(options.threads)
    where = machine()
    headline(f"Associative recall, {options.pairs} pairs, {options.steps} steps", where)
    table = Table(("run", "<22"), ("accuracy", "8.3f"), ("bound", "6.3g"), ("from caps", "9.3g"))
    rows = []
    for run in options.run:
        rows.append(measure(run, options))
        bounds = (rows[-1].get(k, float("nan")) for k in ("bound", "bound_from_caps"))
        table.row(run, rows[-1]["accuracy"], *bounds)
    finish("recall", where, rows=rows, steps=options.steps, pairs=options.pairs)


if __name__ == "__main__":
    main()
