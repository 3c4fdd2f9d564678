"""Certified against attacked accuracy of a character model trained under caps, and the figure of both curves.

    python benchmarks/certified_accuracy.py                      # trains on the Python language reference, then certifies
    python benchmarks/certified_accuracy.py --text FILE          # any other text
    python benchmarks/certified_accuracy.py --model RUN          # a run folder of examples/train_char_lm.py, and its text
    python benchmarks/certified_accuracy.py --smoke

At each eps every token's embedding (what enters the first block) may move by RMS norm eps, all at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path
from pydoc_data import topics

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", help="a text file; the Python language reference without")
    parser.add_argument(
        "--model", help="a run folder of examples/train_char_lm.py, in place of training"
    )
    parser.add_argument("--out", default="runs/certified_accuracy", help="folder of the figure")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    for name, default, text in (
        ("steps", 500, "optimizer steps"),
        ("length", 64, "characters in a sequence"),
        ("width", 128, "of the model"),
        ("layers", 3, "of the model"),
        ("preset", "robust", "of LipschitzConfig: robust, accurate or paper"),
        ("logit-scale", 5.0, "of LipschitzConfig: an inverse temperature"),
        ("margin", 0.0, "of MarginLoss, at the network's own scale; 0 trains without"),
        ("w-max", 1.0, "cap on every block, RMS->RMS norm"),
        ("lr", 0.1, "RMS->RMS norm per step"),
        ("sequences", 16, "sequences that are certified and attacked"),
        ("refine", 12, "backward passes on a token at most"),
        ("restarts", 4, "of the attack"),
        ("attack-steps", 40, "of the attack"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.width, options.layers, options.length = 10, 32, 2, 16
        options.sequences, options.restarts, options.attack_steps = 2, 2, 5
    return options


def encoded(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Ids of the first nine tenths, of the rest, and the vocabulary."""
    text = Path(options.text).read_text() if options.text else "\n".join(topics.topics.values())
    saved = Path(options.model) / "vocabulary.json" if options.model else None
    vocabulary = json.loads(saved.read_text()) if saved else sorted(set(text))
    index = {c: i for i, c in enumerate(vocabulary)}
    cut = int(0.9 * len(text))
    train, held_out = ([index[c] for c in part if c in index] for part in (text[:cut], text[cut:]))
    return torch.tensor(train), torch.tensor(held_out), vocabulary


def train(ids: torch.Tensor, vocabulary: int, options: argparse.Namespace) -> GPT2LMHeadModel:
    sizes = {
        "n_embd": options.width,
        "n_layer": options.layers,
        "n_head": 4,
        "n_positions": options.length,
    }
    nothing = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    nothing |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **nothing))
    changes = {"w_max": options.w_max, "biases": "drop", "logit_scale": options.logit_scale}
    retrofit(model, LipschitzConfig.preset(options.preset, **changes))
    loss = MarginLoss(model, options.margin)
    optimizer = LipschitzMuon(model, lr=options.lr, embedding_lr=options.lr / 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0 - s / options.steps)
    for _ in range(options.steps):
        at = torch.randint(len(ids) - options.length, (24,))
        batch = torch.stack([ids[i : i + options.length] for i in at])
        optimizer.zero_grad()
        loss(model(batch).logits, batch).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    options = parse()
    disable_progress_bar()
    torch.manual_seed(0)
    began = time.perf_counter()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    ids, held_out, vocabulary = encoded(options)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(Path(options.model) / "model").eval()
    else:
        model = train(ids, len(vocabulary), options)
        model.save_pretrained(out / "model")
        (out / "vocabulary.json").write_text(json.dumps(vocabulary))
    trained = time.perf_counter()
    batches = list(held_out[: options.sequences * options.length].view(-1, options.length).split(8))
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
    print(
        f"clean accuracy {certified.clean:.1%} on {certified.right.shape[1]} tokens; global bound {bound:.4g}"
    )
    print(f"{'eps':>8} {'certified':>10} {'attacked':>10}")
    for eps, low, high in zip(EPS, certified.accuracy, attacked.accuracy, strict=True):
        print(f"{eps:>8} {low:>10.1%} {high:>10.1%}")
    print(
        "seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()) + f"; figure in {out}"
    )
    result = {
        "benchmark": "certified_accuracy",
        "options": {k: v for k, v in vars(options).items() if k not in ("text", "model", "out")},
        "clean": certified.clean,
        "tokens": certified.right.shape[1],
        "eps": EPS,
        "certified": certified.accuracy,
        "attacked": attacked.accuracy,
        "lipschitz_upper": bound,
        "seconds": seconds,
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
