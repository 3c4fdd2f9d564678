"""What accuracy is there at which proven bound, by method, optimizer and cap?

    python benchmarks/frontier.py --task mlp --budget small --seeds 2     # digits, as committed
    python benchmarks/frontier.py --task mlp --dataset cifar10 --budget full
    python benchmarks/frontier.py --task char --text FILE --budget small --only 'soft_cap/adamw/*'
    python benchmarks/frontier.py --task char --list                      # its runs
    python benchmarks/frontier.py --task mlp --figure docs/frontier.png   # from the file alone
    python benchmarks/frontier.py --task char --budget brief --text FILE --presets docs/presets.png
    python benchmarks/frontier.py --smoke

Each run appends one JSON line to the results file. Runs that are there already are skipped, so
that an interrupted benchmark goes on where it was. Where a run has several learning rates, the
first seed chooses the one of least loss (at the training temperature) on a part of the data that is
kept for that, and the other seeds take it. Numbers are on held-out data.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import math
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from common import ROOT, finish, headline, machine, parser
from frontier_tasks import presets
from frontier_tasks.runs import BUDGETS, Run, char_runs, mlp_runs
from frontier_tasks.table import draw, table
from tqdm.auto import tqdm

TASKS = {"mlp": mlp_runs, "char": char_runs}
RESULTS = {
    "mlp": ROOT / "docs" / "frontier.jsonl",
    "char": ROOT / "docs" / "frontier_char.jsonl",
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, text=True)
    made.add_argument("--task", choices=TASKS, default="mlp")
    made.add_argument(
        "--budget", choices=("smoke", "brief", "quick", "small", "full"), default="small"
    )
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        help="names of runs, with * and ?; also for table and figure",
    )
    made.add_argument("--results", type=Path, help="the file of JSON lines; in docs/ without")
    made.add_argument(
        "--dataset", help="mlp: an image data set of the hub; scikit-learn's digits without"
    )
    made.add_argument("--list", action="store_true", help="names, and which seeds are done")
    made.add_argument("--figure", type=Path, help="draw this file from the results, train nothing")
    made.add_argument("--presets", type=Path, help="the same, of presets and families")
    made.add_argument("--threads", type=int, help="of torch; all cores without")
    options = made.parse_args(arguments)
    options.results = options.results or RESULTS[options.task]
    return options


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file; a last line that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, in place of a last line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(row) + "\n").encode())


def done(
    rows: list[dict[str, Any]], options: argparse.Namespace, run: Run
) -> dict[int, dict[str, Any]]:
    """Rows of a run by seed. Raises SystemExit if the file holds another run of this name."""
    found = {}
    for row in rows:
        if (row["task"], row["budget"], row["data"], row["name"]) == (*_where(options), run.name):
            if row["run"] != run.plain():
                raise SystemExit(
                    f"{options.results}: {run.name} was run as {row['run']}. "
                    "Rename one, or drop the line."
                )
            found[row["seed"]] = row
    return found


def _where(options: argparse.Namespace) -> tuple[str, str, str]:
    """Task, budget and data, by which rows belong together."""
    given = options.dataset if options.task == "mlp" else options.text
    return options.task, options.budget, Path(given).name if given else "default"


def settings(options: argparse.Namespace) -> argparse.Namespace:
    """The budget's numbers, and where data come from."""
    return argparse.Namespace(
        **BUDGETS[options.task][options.budget], dataset=options.dataset, text=options.text, seed=0
    )


def trained(
    task: Any, run: Run, lr: float, seed: int, split: Any, chosen: argparse.Namespace, steps: int
) -> Any:
    """The model after its last step."""
    loop = task.train(run, lr, seed, split, chosen, steps)
    return deque(tqdm(loop, total=steps, desc=f"{run.name} lr {lr:g}", leave=False), maxlen=1).pop()


def one(
    task: Any, run: Run, seed: int, options: argparse.Namespace, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Train and prove one row of the results.

    Args:
        before: the row of the first seed, whose rate is taken; None tries all rates of the run.
    """
    began, chosen = time.perf_counter(), settings(options)
    split, steps = task.data(chosen, seed), run.steps or chosen.steps
    rates, tried, models = [before["lr"]] if before else list(run.rates), {}, {}
    for lr in rates:
        models[lr] = trained(task, run, lr, seed, split, chosen, steps)
        if len(rates) > 1:
            loss = task.choose(models[lr], split, run.temperature)["loss"]
            tried[lr] = loss if math.isfinite(loss) else math.inf
            for other in [r for r in tried if tried[r] > min(tried.values())]:
                models.pop(other, None)
    lr = min(tried, key=lambda r: tried[r]) if tried else rates[0]
    between = time.perf_counter()
    found = task.evaluate(models[lr], split, chosen)
    name, budget, data = _where(options)
    return {
        **{
            "task": name,
            "budget": budget,
            "data": data,
            "name": run.name,
            "seed": seed,
            "run": run.plain(),
            "lr": lr,
        },
        "tried": {
            f"{r:g}": round(loss, 5) if math.isfinite(loss) else "diverged"
            for r, loss in tried.items()
        },
        **{
            k: _rounded(v) if k in ("certified", "attacked", "accuracy", "loss") else v
            for k, v in found.items()
        },
        "seen": steps * chosen.batch * getattr(chosen, "length", 1),  # images, or characters
        **{
            "steps": steps,
            "seconds": round(between - began, 1),
            "seconds_proving": round(time.perf_counter() - between, 1),
        },
        **machine(DEVICE),
    }


def _rounded(value: Any) -> Any:
    return [round(v, 5) for v in value] if isinstance(value, list) else round(value, 5)


def work(options: argparse.Namespace) -> None:
    """Run whatever is not in the results file yet: first all with one seed, then with the next."""
    runs = [run for run in TASKS[options.task]() if _wanted(run.name, options)]
    if not runs:
        raise SystemExit(f"--only {options.only!r} matches no run; --list shows their names.")
    rows = read(options.results)
    if options.list:
        for run in runs:
            print(f"{run.name:<50} seeds done: {sorted(done(rows, options, run))}")
        return
    wanted = [(run, seed) for seed in range(options.seeds) for run in runs]
    todo = [(run, seed) for run, seed in wanted if seed not in done(rows, options, run)]
    task = importlib.import_module(f"frontier_tasks.{options.task}") if todo else None
    for run, seed in tqdm(todo, desc=f"{options.task} {options.budget}"):
        row = one(task, run, seed, options, done(rows, options, run).get(0))
        rows.append(row)
        append(options.results, row)


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of this task, budget and data."""
    rows = read(options.results)
    here = [row for row in rows if (row["task"], row["budget"], row["data"]) == _where(options)]
    return [row for row in here if _wanted(row["name"], options)]


def _wanted(name: str, options: argparse.Namespace) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in options.only)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            smoke(options, Path(folder))
        return
    if not (options.figure or options.presets):
        work(options)
    if options.list:
        return
    rows = rows_of(options)
    if options.figure:
        draw(rows, options.figure)
    if options.presets:
        presets.draw(rows, options.presets)
    conclude(rows, options)


def conclude(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table, and the JSON line."""
    where = machine(DEVICE)
    headline(f"frontier of {options.task}; each result names its own machine, this is", where)
    print(table(rows))
    about = {"task": options.task, "budget": options.budget, "rows": len(rows)}
    finish("frontier", where, **about)


def smoke(options: argparse.Namespace, folder: Path) -> None:
    """A run of each kind in both tasks, then the table and the figure."""
    options.budget, options.results = "smoke", folder / "results.jsonl"
    for options.task in TASKS:
        options.only = ["unconstrained/*", "*soft_cap/*/1"]
        work(options)
        rows = rows_of(options)
        draw(rows, folder / f"{options.task}.png")
        conclude(rows, options)


if __name__ == "__main__":
    main()
