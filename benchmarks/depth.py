"""How deep does a preset learn, beside the same model without constraint?

    python benchmarks/depth.py --text FILE                         # the rows of docs/depth.md
    python benchmarks/depth.py --text FILE --family llama --layers 24 --run accurate
    python benchmarks/depth.py --text FILE --width 256 --lr 0.05 0.1 0.2 --run accurate
    python benchmarks/depth.py --figure docs/depth.png             # from the file of rows alone
    python benchmarks/depth.py --rates docs/rates.png              # loss by learning rate, likewise
    python benchmarks/depth.py --smoke

A run is a preset, or "adamw" or "muon" for a twin that keeps its norms and has no constraint. All
runs see equally many characters. Each appends one JSON line to the results file, and runs that are
there already are skipped. Bounds are at the network's own scale: the logits are divided by
`logit_scale`, which no prediction depends on. `attained` is what an attack reaches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    ROOT,
    Characters,
    Table,
    byte_pairs,
    character_model,
    characters,
    finish,
    headline,
    machine,
    parser,
    windows,
)
from depth_tasks import figures
from torch import Tensor
from tqdm import tqdm
from twins import TorchMuon

from lip_plugin import LipschitzMuon, certify, config_of, falsify, retrofit
from lip_plugin.config_values import PRESETS

TWINS = {"adamw": (1e-3, 3e-3, 1e-2), "muon": (0.01, 0.02, 0.05)}
RESULTS = ROOT / "docs" / "depth.jsonl"


def parse() -> argparse.Namespace:
    made = parser(
        __doc__, text=True, device=True, steps=200, length=128, batch=(16, "sequences in a step")
    )
    made.add_argument("--family", nargs="+", default=["gpt2", "llama"])
    made.add_argument("--layers", type=int, nargs="+", default=[3, 12, 24, 48])
    made.add_argument("--width", type=int, nargs="+", default=[128])
    made.add_argument("--run", nargs="+", default=[*PRESETS, *TWINS], help="presets and twins")
    made.add_argument("--lr", type=float, nargs="+", help="RMS->RMS norm per step; 0.1 without")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--byte-pairs", type=int, metavar="N", help="a vocabulary of N byte pairs")
    made.add_argument("--attack", action="store_true", help="attack the trained model as well")
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--figure", type=Path, help="draw this file from the results, train nothing")
    made.add_argument("--rates", type=Path, help="the same, of losses by learning rate")
    options = made.parse_args()
    if options.smoke:
        options.layers, options.width, options.length, options.steps = [1, 2], [32], 16, 3
        options.results = None
    return options


def accuracy_of_bigrams(text: Characters) -> float:
    """Share of held-out characters that are the most frequent successor of the one before."""
    size = len(text.vocabulary)
    pairs = text.train[:-1] * size + text.train[1:]
    best = torch.bincount(pairs, minlength=size * size).view(size, size).argmax(1)
    return float((best[text.held_out[:-1]] == text.held_out[1:]).float().mean())


@torch.no_grad()
def judge(model: Any, text: Characters, length: int) -> dict[str, float]:
    """Accuracy and loss on the first 256 sequences that were held out."""
    count = min(256, len(text.held_out) // length)
    accuracy = loss = 0.0
    model.eval()
    device = next(model.parameters()).device
    for ids in text.held_out[: count * length].view(count, length).to(device).split(64):
        out = model(ids, labels=ids)
        right = (out.logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
        accuracy += float(right) * len(ids) / count
        loss += float(out.loss) * len(ids) / count
    return {"accuracy": round(accuracy, 4), "loss": round(loss, 4)}


def optimizers(model: Any, run: str, lr: float) -> list[torch.optim.Optimizer]:
    """The optimizers of a run, stepped together."""
    if run in PRESETS:
        return [LipschitzMuon(model, lr=lr)]
    if run == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = {id(model.get_output_embeddings().weight)}
    inner = [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables | head]
    known = set(map(id, inner))
    rest = [p for p in model.parameters() if id(p) not in known]
    muon = TorchMuon(inner, lr=lr, weight_decay=0.0, adjust_lr_fn="original")
    return [muon, torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def train(model: Any, run: str, lr: float, text: Characters, options: Any) -> list[float]:
    """Train at a rate that falls to zero in a straight line; returns the losses of all steps."""
    stepping = optimizers(model, run, lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0 - step / options.steps)
        for o in stepping
    ]
    generator, losses = torch.Generator().manual_seed(options.seed + 1), []
    model.train()
    for _ in tqdm(range(options.steps), desc=f"{run}, lr {lr:g}", leave=False):
        batch: Tensor = windows(text.train, options.length, options.batch, generator)
        batch = batch.to(options.device)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(stepping, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def measure(key: dict[str, Any], text: Characters, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model and judge it."""
    torch.manual_seed(options.seed)
    size = len(text.vocabulary)
    model = character_model(key["family"], size, key["width"], key["layers"], options.length)
    constrained = key["run"] in PRESETS
    if constrained:
        retrofit(model, key["run"])
    model.to(options.device)
    start = time.perf_counter()
    losses = train(model, key["run"], key["lr"], text, options)
    row = {**key, "seconds": round(time.perf_counter() - start)}
    row |= {"loss_0": round(losses[0], 3), "loss_10": round(losses[min(10, len(losses) - 1)], 3)}
    row |= judge(model, text, options.length)
    if constrained:
        scale = config_of(model).logit_scale or 1.0
        row["bound"] = certify(model).lipschitz / scale
        row["bound_from_caps"] = certify(model, "caps").lipschitz / scale
        if options.attack:
            row["attained"] = falsify(model, restarts=4, steps=40).lower_bound / scale
    return row


def read(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if "\n" in line]


# Of a run over characters.
_CHARACTERS = {"byte_pairs": None}


def keys(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What identifies each run that was asked for, the shallow ones first."""
    found = []
    for layers, width, family, run in itertools.product(
        options.layers, options.width, options.family, options.run
    ):
        for lr in options.lr or TWINS.get(run, (0.1,)):
            key = {"family": family, "layers": layers, "width": width, "run": run, "lr": lr}
            key |= {"steps": options.steps, "seed": options.seed}
            found.append({**key, "byte_pairs": options.byte_pairs} if options.byte_pairs else key)
    return found


def main() -> None:
    options = parse()
    if options.figure or options.rates:
        draw = figures.depth if options.figure else figures.rates
        draw(read(options.results), options.figure or options.rates)
        return
    where, text = machine(options.device), characters(options.text)
    if options.byte_pairs:
        text = byte_pairs(options.text, options.byte_pairs)
    bigram = accuracy_of_bigrams(text)
    headline(f"Depth, {options.steps} steps of 16 x {options.length}, bigrams {bigram:.3f}", where)
    table = Table(
        *(("family", "6"), ("layers", "6d"), ("width", "5d"), ("run", "8"), ("lr", "5g")),
        *(("accuracy", "8.3f"), ("loss", "6.3f"), ("bound", "6.3g"), ("attained", "8.3g")),
    )
    done, rows = read(options.results), []
    for key in keys(options):
        same = [
            row
            for row in done
            if {k: row.get(k) for k in {**_CHARACTERS, **key}} == {**_CHARACTERS, **key}
        ]
        row = same[-1] if same else {**measure(key, text, options), **where, "bigram": bigram}
        if not same and options.results:
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        shown = ("family", "layers", "width", "run", "lr", "accuracy", "loss")
        bounds = (row.get(k, float("nan")) for k in ("bound", "attained"))
        table.row(*(row[k] for k in shown), *bounds)
        rows.append(row)
    finish("depth", where, bigram=bigram, rows=len(rows))


if __name__ == "__main__":
    main()
