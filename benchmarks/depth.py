"""How deep does a preset learn? A GPT-2 over characters, under one preset at several depths.

    python benchmarks/depth.py --text FILE       # about ten minutes on two cores
    python benchmarks/depth.py --smoke

The share is what all layers but one pass on of a signal at the start, the product of their 1-a. It
is what lip_plugin/surgery/depth.py warns of. The bigram model is the one with the counts of the
training text.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import (
    Characters,
    Table,
    character_gpt2,
    characters,
    finish,
    fit,
    headline,
    machine,
    parsed,
    parser,
    windows,
)

from lip_plugin import LipschitzConfig, LipschitzMuon, retrofit
from lip_plugin.model.architecture import find_family
from lip_plugin.model.parts import parts
from lip_plugin.surgery.depth import passed_on

PRESETS = ("robust", "accurate", "paper")
DEPTHS = (3, 4, 5, 6, 8, 12)


def parse() -> argparse.Namespace:
    values = {"steps": 200, "length": 128, "width": 128, "lr": 0.1}
    made = parser(__doc__, text=True, **values)
    made.add_argument("--layers", type=int, nargs="+", default=list(DEPTHS))
    made.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    return parsed(made, steps=3, length=16, width=32, layers=[1, 2], presets=["robust"])


def accuracy_of_bigrams(text: Characters) -> float:
    """Share of held-out characters that are the most frequent successor of the one before."""
    size = len(text.vocabulary)
    pairs = text.train[:-1] * size + text.train[1:]
    best = torch.bincount(pairs, minlength=size * size).view(size, size).argmax(1)
    return float((best[text.held_out[:-1]] == text.held_out[1:]).float().mean())


@torch.no_grad()
def judge(model: Any, text: Characters, length: int) -> tuple[float, float]:
    """(accuracy, loss) on the first 64 sequences that were held out."""
    count = min(64, len(text.held_out) // length)
    ids = text.held_out[: count * length].view(count, length)
    out = model(ids, labels=ids)
    right = out.logits[:, :-1].argmax(-1) == ids[:, 1:]
    return float(right.float().mean()), float(out.loss)


def run(preset: str, layers: int, text: Characters, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = character_gpt2(len(text.vocabulary), options.width, layers, options.length)
    config = LipschitzConfig.preset(preset)
    retrofit(model, config)
    names = parts(model, find_family(model).architecture)
    share = 2.0 ** ((layers - 1) * passed_on(names, config))
    optimizer = LipschitzMuon(model, lr=options.lr)
    fit(
        model,
        optimizer,
        options.steps,
        lambda: windows(text.train, options.length, 16),
        title=f"{preset}, {layers} layers",
    )
    accuracy, loss = judge(model, text, options.length)
    return {
        "preset": preset,
        "layers": layers,
        "share": share,
        "accuracy": accuracy,
        "loss": loss,
    }


def main() -> None:
    options = parse()
    where, text = machine(), characters(options.text)
    bigram = accuracy_of_bigrams(text)
    headline(f"Depth, {options.steps} steps of 16 x {options.length}, bigrams {bigram:.3f}", where)
    table = Table(
        ("preset", "8"), ("layers", "6d"), ("share", "9.1e"), ("accuracy", "8.3f"), ("loss", "6.3f")
    )
    rows = []
    for preset in options.presets:
        for layers in options.layers:
            rows.append(run(preset, layers, text, options))
            table.row(*rows[-1].values())
    finish("depth", where, bigram=bigram, rows=rows)


if __name__ == "__main__":
    main()
