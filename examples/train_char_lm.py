"""Train a small GPT on real text under enforced Lipschitz constants, with a certificate at the end.

    python examples/train_char_lm.py                       # the Python language reference; offline
    python examples/train_char_lm.py --text FILE           # any text file
    python examples/train_char_lm.py --dataset HUB_ID      # any text dataset of the hub
    torchrun --nproc_per_node 2 examples/train_char_lm.py  # the same on two processes

The model and the Trainer are stock. The run folder holds model/, certificate.json, metrics.json and
figure.png.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from pydoc_data import topics

import torch
from datasets import Dataset, load_dataset
from transformers import (
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lip_plugin import LipschitzCallback, LipschitzConfig, certify, falsify
from lip_plugin.integrations.plots import plot_run


def read_text(options: argparse.Namespace) -> str:
    if options.dataset:
        return "\n".join(load_dataset(options.dataset, split="train")["text"])
    if options.text:
        return "\n".join(load_dataset("text", data_files=options.text, split="train")["text"])
    return "\n".join(topics.topics.values())


def encode(text: str, length: int) -> tuple[Dataset, Dataset, list[str], str]:
    """Blocks of `length` characters to train and to validate on.

    The vocabulary and the text of the validation come with them.
    """
    vocabulary = sorted(set(text))
    index = {c: i for i, c in enumerate(vocabulary)}
    cut = int(0.9 * len(text))
    sets = []
    for part in (text[:cut], text[cut:]):
        ids = [index[c] for c in part]
        blocks = [ids[i : i + length] for i in range(0, len(ids) - length, length)]
        sets.append(Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch"))
    return sets[0], sets[1], vocabulary, text[cut:]


def bigram_accuracy(train: str, validation: str) -> float:
    """The share of validation characters that a bigram model predicts.

    It predicts the most frequent successor in the training text.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for a, b in zip(train, train[1:]):
        counts[a][b] += 1
    best = {a: c.most_common(1)[0][0] for a, c in counts.items()}
    return sum(best.get(a) == b for a, b in zip(validation, validation[1:])) / (len(validation) - 1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {
        "accuracy": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", help="a text file to learn")
    parser.add_argument("--dataset", help="a dataset of the hub with a text column")
    parser.add_argument("--out", default="runs/char_lm", help="the run folder")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    for name, default, text in (
        ("steps", 900, "optimizer steps"),
        ("length", 128, "characters in a sequence"),
        ("width", 128, "of the model"),
        ("layers", 3, "of the model"),
        ("preset", "robust", "of LipschitzConfig: robust, accurate or paper"),
        ("w-max", 1.0, "cap on every block, RMS->RMS norm"),
        ("lr", 0.1, "RMS->RMS norm per step"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.smoke:
        options.steps, options.width, options.layers, options.length = 6, 32, 2, 32
    set_seed(0)
    text = read_text(options)
    train, validation, vocabulary, held_out = encode(text, options.length)
    validation = validation.select(range(min(len(validation), 8 if options.smoke else 600)))
    bigram = bigram_accuracy(text[: -len(held_out)], held_out[: len(validation) * options.length])
    sizes = {
        "n_embd": options.width,
        "n_layer": options.layers,
        "n_head": 4,
        "n_positions": options.length,
    }
    nothing = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    nothing |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **sizes, **nothing))
    args = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=24,
        per_device_eval_batch_size=100,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        logging_steps=max(1, options.steps // 40),
        eval_strategy="steps",
        eval_steps=max(1, options.steps // 6),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    # biases have no cap: without them the certificate from caps holds for the whole run
    config = LipschitzConfig.preset(options.preset, w_max=options.w_max, biases="drop")
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=[LipschitzCallback(config, embedding_lr=options.lr / 2)],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        finish(trainer, Path(options.out), vocabulary, bigram, options.smoke)


def finish(trainer: Trainer, out: Path, vocabulary: list[str], bigram: float, smoke: bool) -> None:
    model, history = trainer.model, trainer.state.log_history
    trainer.save_model(str(out / "model"))
    (out / "vocabulary.json").write_text(json.dumps(vocabulary))
    (out / "metrics.json").write_text(json.dumps(history, indent=1))
    plot_run(history, model, out / "figure.png", {"bigram accuracy": bigram})
    model.eval()
    start = torch.tensor([[vocabulary.index("\n")]], device=model.device)
    length = model.config.n_positions - 1
    sample = model.generate(
        start, max_new_tokens=length, do_sample=True, top_k=None, pad_token_id=0
    )
    certificate, attack = certify(model), falsify(model, restarts=4, steps=10 if smoke else 60)
    last = [row for row in history if "eval_accuracy" in row][-1]
    print("".join(vocabulary[i] for i in sample[0]))
    print(certificate)
    print(f"attained by an attack (a lower bound): {attack.lower_bound:.4g}")
    print(
        "from caps, for every step of the run:  "
        f"10^{certify(model, 'caps').log10_lipschitz:.2f}; figure: {out}"
    )
    print(f"validation accuracy {last['eval_accuracy']:.1%}, a bigram model's {bigram:.1%}")


if __name__ == "__main__":
    main()
