"""Fine-tune a model with LoRA under a budget, and prove how far any logit can have moved.

    python examples/finetune_lora.py                  # the base is trained here first; offline
    python examples/finetune_lora.py --base FOLDER    # a run folder of train_char_lm.py

The base reads English (the Python language reference). LoRA teaches it source code (the standard
library's). Each budget is the share of the base's own norm that a block of weights may change by,
kept after every step. The run folder holds the adapters, certificates, results.json and figure.png:
what is learned and forgotten, and the drift, proven and attacked.
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from pydoc_data import topics
from typing import Any

import peft
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from lip_plugin import LipschitzCallback, LipschitzConfig, certify, drift
from lip_plugin.integrations.plots import plot_budgets


def texts() -> tuple[str, str]:
    """English, and Python."""
    import argparse as a
    import collections as b
    import dataclasses as c
    import tarfile as d

    return "\n".join(topics.topics.values()), "".join(inspect.getsource(m) for m in (a, b, c, d))


def blocks(text: str, vocabulary: list[str], length: int) -> tuple[Dataset, Dataset]:
    """Training and validation sequences of `length` characters."""
    index = {c: i for i, c in enumerate(vocabulary)}
    ids = [index[c] for c in text if c in index]
    rows = [ids[i : i + length] for i in range(0, len(ids) - length, length)]
    cut = int(0.9 * len(rows))
    sets = [
        Dataset.from_dict({"input_ids": r, "labels": r}).with_format("torch")
        for r in (rows[:cut], rows[cut:])
    ]
    return sets[0], sets[1]


def fit(
    model: Any,
    data: Dataset,
    folder: Path,
    options: argparse.Namespace,
    callback: LipschitzCallback,
    lr: float,
) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=24,
        per_device_eval_batch_size=100,
        learning_rate=lr,
        lr_scheduler_type="linear",
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    trainer.train()
    return trainer


def base_of(options: argparse.Namespace, vocabulary: list[str], english: Dataset) -> Any:
    """A constrained character model: loaded, or trained here."""
    if options.base:
        return GPT2LMHeadModel.from_pretrained(Path(options.base, "model"))
    nothing = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    nothing |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    sizes = {"n_embd": options.width, "n_layer": 2, "n_head": 4, "n_positions": options.length}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **sizes, **nothing))
    fit(
        model,
        english,
        Path(options.out, "base"),
        options,
        LipschitzCallback(LipschitzConfig.preset("paper", biases="drop", logit_scale=10.0)),
        0.1,
    )
    model.save_pretrained(Path(options.out, "base", "model"))
    return model


def tune(
    folder: Path, budget: float, new: Any, old: Any, options: argparse.Namespace
) -> dict[str, float]:
    """Train LoRA under one budget on the base that lies in `folder`.

    Gives its losses, its drift and its certificate.
    """
    set_seed(1)
    base = GPT2LMHeadModel.from_pretrained(folder)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    model = peft.get_peft_model(base, config)
    out = Path(options.out, f"budget_{budget:g}")
    trainer = fit(model, new[0], out, options, LipschitzCallback(adapter_budget=budget), 3e-3)
    found = drift(model, restarts=4, steps=5 if options.smoke else 60)
    print(f"budget {budget:g}: {found.summary}")
    trainer.save_model(str(out))
    (out / "drift.txt").write_text(str(found))
    worst = [
        row["lip/worst_norm_over_cap"]
        for row in trainer.state.log_history
        if "lip/worst_norm_over_cap" in row
    ]
    return {
        "budget": budget,
        "new": trainer.evaluate(new[1])["eval_loss"],
        "old": trainer.evaluate(old[1])["eval_loss"],
        "drift_upper": found.logit_upper,
        "drift_lower": found.logit_lower,
        "certificate": certify(model).lipschitz,
        "worst_norm": max(worst),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", help="a run folder of train_char_lm.py")
    parser.add_argument("--out", default="runs/finetune_lora", help="the run folder")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.width, options.length, options.budgets = 4, 32, 32, [0.03, 0.3]
    set_seed(0)
    english, python = texts()
    vocabulary = sorted(set(english))
    if options.base:
        vocabulary = json.loads(Path(options.base, "vocabulary.json").read_text())
    old, new = (blocks(text, vocabulary, options.length) for text in (english, python))
    few = range(4 if options.smoke else 200)
    old, new = (old[0], old[1].select(few)), (new[0], new[1].select(few))
    base = base_of(options, vocabulary, old[0])
    folder = Path(options.base or Path(options.out, "base"), "model")
    judge = Trainer(
        base,
        TrainingArguments(
            str(options.out), report_to="none", use_cpu=not torch.cuda.is_available()
        ),
    )
    start = {"new": judge.evaluate(new[1])["eval_loss"], "old": judge.evaluate(old[1])["eval_loss"]}
    rows = [tune(folder, budget, new, old, options) for budget in options.budgets]
    Path(options.out, "results.json").write_text(
        json.dumps({"before": start, "rows": rows}, indent=1)
    )
    plot_budgets(rows, start, Path(options.out, "figure.png"))
    columns = ("budget", "new", "old", "drift_upper", "drift_lower", "certificate")
    print(" ".join(f"{c:>11}" for c in columns))
    for row in ({"budget": 0.0, **start}, *rows):
        print(" ".join(f"{row.get(c, float('nan')):>11.4g}" for c in columns))


if __name__ == "__main__":
    main()
