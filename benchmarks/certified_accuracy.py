"""How many predictions are proven right, and how many survive an attack, when embeddings move?

    python benchmarks/certified_accuracy.py                # trains, then certifies
    python benchmarks/certified_accuracy.py --text FILE    # on any other text
    python benchmarks/certified_accuracy.py --model RUN    # a run of examples/train_char_lm.py
    python benchmarks/certified_accuracy.py --smoke

A character model is trained under caps, on the Python language reference by default. At each eps
the embedding of every token, which is what enters the first block, may move by an RMS norm of eps,
all at once. The figure of both curves goes into --out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

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
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from lip_plugin import (
    LipschitzConfig,
    LipschitzMuon,
    MarginLoss,
    attacked_accuracy,
    certified_accuracy,
    certify,
    retrofit,
)
from lip_plugin.integrations.plots import plot_certified_accuracy

EPS = (0.001, 0.003, 0.01, 0.03, 0.1)


def parse() -> argparse.Namespace:
    made = parser(
        __doc__,
        text=True,
        steps=500,
        length=64,
        width=128,
        layers=3,
        preset=("robust", "of LipschitzConfig: robust, accurate or paper"),
        logit_scale=(5.0, "of LipschitzConfig: an inverse temperature"),
        margin=(0.0, "of MarginLoss, at the network's own scale; 0 trains without"),
        w_max=1.0,
        lr=0.1,
        sequences=(16, "sequences that are certified and attacked"),
        refine=(12, "backward passes on a token at most"),
        restarts=4,
        attack_steps=40,
    )
    made.add_argument(
        "--model", help="a run folder of examples/train_char_lm.py, in place of training"
    )
    made.add_argument("--out", default="runs/certified_accuracy", help="folder of the figure")
    tiny = {"steps": 10, "width": 32, "layers": 2, "length": 16}
    return parsed(made, **tiny, sequences=2, restarts=2, attack_steps=5)


def train(text: Characters, options: argparse.Namespace) -> GPT2LMHeadModel:
    """A character model that was trained under caps."""
    model = character_gpt2(len(text.vocabulary), options.width, options.layers, options.length)
    changes = {"w_max": options.w_max, "biases": "drop", "logit_scale": options.logit_scale}
    retrofit(model, LipschitzConfig.preset(options.preset, **changes))
    margin = MarginLoss(model, options.margin)
    return fit(
        model,
        LipschitzMuon(model, lr=options.lr, embedding_lr=options.lr / 2),
        options.steps,
        lambda: windows(text.train, options.length, 24),
        loss=lambda model, batch: margin(model(batch).logits, batch),
    )


def main() -> None:
    options = parse()
    disable_progress_bar()
    torch.manual_seed(0)
    began = time.perf_counter()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    saved = Path(options.model) / "vocabulary.json" if options.model else None
    text = characters(options.text, json.loads(saved.read_text()) if saved else None)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(Path(options.model) / "model").eval()
    else:
        model = train(text, options)
        model.save_pretrained(out / "model")
        (out / "vocabulary.json").write_text(json.dumps(text.vocabulary))
    trained = time.perf_counter()
    held_out = text.held_out[: options.sequences * options.length].view(-1, options.length)
    batches = list(held_out.split(8))
    certified = certified_accuracy(model, batches, EPS, refine=options.refine)
    proven = time.perf_counter()
    attacked = attacked_accuracy(
        model, batches, EPS, restarts=options.restarts, steps=options.attack_steps
    )
    seconds = {
        "training": trained - began,
        "certifying": proven - trained,
        "attacking": time.perf_counter() - proven,
    }
    bound = certify(model).lipschitz
    plot_certified_accuracy({"": (certified, attacked)}, out / "certified_accuracy.png")
    where = machine()
    headline("certified and attacked accuracy", where)
    print(
        f"clean accuracy {certified.clean:.1%} on {certified.right.shape[1]} tokens; "
        f"global bound {bound:.4g}"
    )
    table = Table(("eps", "8"), ("certified", "10.1%"), ("attacked", "10.1%"))
    for row in zip(EPS, certified.accuracy, attacked.accuracy, strict=True):
        table.row(*row)
    print(
        "seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()) + f"; figure in {out}"
    )
    finish(
        "certified_accuracy",
        where,
        options={k: v for k, v in vars(options).items() if k not in ("text", "model", "out")},
        clean=certified.clean,
        tokens=certified.right.shape[1],
        eps=EPS,
        certified=certified.accuracy,
        attacked=attacked.accuracy,
        lipschitz_upper=bound,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
