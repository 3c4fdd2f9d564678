"""Turn a model that was trained with norms into a constrained one, without losing what it knows.

    python examples/retrofit_pretrained.py     # trains a small GPT-2 with norms first; offline
    python examples/retrofit_pretrained.py --model FOLDER --text FILE
    python examples/retrofit_pretrained.py --quantile 1 --w-max 1.5

The model of --model is one over characters, as an earlier run left it. A floor rises under what
every norm divides by, to one that the text hardly meets (calibrate). Caps start at the weights' own
norms and tighten while the model trains on. With --quantile 1 all tokens are below the floors, so
that no norm is left. The run folder holds model/, certificate.json, metrics.json and figure.png.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from lip_plugin import (
    LipschitzCallback,
    LipschitzConfig,
    RetrofitSchedule,
    calibrate,
    certify,
    own_caps,
    retrofit,
)
from lip_plugin.integrations.plots import plot_retrofit


def trainer_of(
    model: Any, data: Any, folder: Path, steps: int, lr: float, callbacks: list[Any]
) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=24,
        per_device_eval_batch_size=100,
        learning_rate=lr,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        warmup_steps=20,
        logging_steps=max(1, steps // 30),
        eval_strategy="steps",
        eval_steps=max(1, steps // 15),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    return Trainer(
        model=model, args=args, train_dataset=data[0], eval_dataset=data[1], callbacks=callbacks
    )


def read(options: argparse.Namespace) -> tuple[list[str], tuple[Dataset, Dataset]]:
    """The characters that there are, and sequences of their numbers to train and to judge on."""
    text = Path(options.text).read_text() if options.text else "\n".join(topics.topics.values())
    kept = Path(options.model, "vocabulary.json") if options.model else None
    vocabulary = json.loads(kept.read_text()) if kept else sorted(set(text))
    index = {c: i for i, c in enumerate(vocabulary)}
    ids = [index[c] for c in text if c in index]
    rows = [
        ids[i : i + options.length] for i in range(0, len(ids) - options.length, options.length)
    ]
    cut = int(0.9 * len(rows))
    held = rows[cut : cut + (4 if options.smoke else 300)]
    sets = [
        Dataset.from_dict({"input_ids": r, "labels": r}).with_format("torch")
        for r in (rows[:cut], held)
    ]
    return vocabulary, (sets[0], sets[1])


def pretrained(options: argparse.Namespace, vocabulary: list[str], data: Any) -> Any:
    """An ordinary GPT-2, with its norms: loaded, or trained here."""
    if options.model:
        return GPT2LMHeadModel.from_pretrained(options.model)
    nothing = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    nothing |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    sizes = {"n_embd": options.width, "n_layer": 3, "n_head": 4, "n_positions": options.length}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **sizes, **nothing))
    folder = Path(options.out, "pretrained")
    trainer_of(model, data, folder, 2 * options.steps, 2e-3, []).train()
    model.save_pretrained(folder)
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    return model


def loss_of(model: Any, data: Any, folder: Path) -> float:
    return trainer_of(model, data, folder, 1, 1e-3, []).evaluate()["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder of a GPT-2 over characters, with vocabulary.json")
    parser.add_argument("--text", help="a text file")
    parser.add_argument("--out", default="runs/retrofit_pretrained", help="the run folder")
    parser.add_argument(
        "--steps", type=int, default=600, help="of the retrofit; pretraining takes twice as many"
    )
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument(
        "--quantile", type=float, default=0.05, help="of what norms divide by: the floors"
    )
    parser.add_argument("--w-max", type=float, default=2.0, help="where the caps go")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.width, options.length = 6, 32, 32
    set_seed(0)
    out = Path(options.out)
    vocabulary, data = read(options)
    model = pretrained(options, vocabulary, data)
    batches = [
        data[0][i : i + 8]["input_ids"] for i in range(0, 32, 8)
    ]  # not shuffled: a resumed run needs the same
    marks = {"with its norms": loss_of(model, data, out)}
    own, floors = own_caps(model), calibrate(model, batches, quantile=options.quantile)
    for name, config in {
        "norms removed by the recipe": LipschitzConfig.preset(
            "paper", norms="remove", init="keep", overrides=own
        ),
        "floors, not trained on": LipschitzConfig(
            norms="calibrated", norm_floors=floors, overrides=own
        ),
    }.items():
        twin = copy.deepcopy(model)
        retrofit(twin, config)
        marks[name] = loss_of(twin, data, out)
    schedule = RetrofitSchedule(every=1 if options.smoke else 10)
    config = LipschitzConfig(norms="calibrated", w_max=options.w_max, norm_floors=floors)
    trainer = trainer_of(
        model, data, out, options.steps, 1e-3, [LipschitzCallback(config, schedule=schedule)]
    )
    trainer.train()
    trainer.save_model(str(out / "model"))
    (out / "metrics.json").write_text(json.dumps(trainer.state.log_history, indent=1))
    plot_retrofit(trainer.state.log_history, marks, out / "figure.png")
    end = loss_of(model, data, out)
    print(certify(model))
    print(
        ", ".join(f"{name} {value:.3f}" for name, value in marks.items())
        + f"; at the end {end:.3f}. Figure: {out}"
    )


if __name__ == "__main__":
    main()
