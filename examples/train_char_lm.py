"""Train a small GPT on real text under enforced Lipschitz constants, and leave a certificate behind.

    python examples/train_char_lm.py                       # the Python language reference; offline
    python examples/train_char_lm.py --text FILE           # any text file
    python examples/train_char_lm.py --dataset HUB_ID      # any text dataset of the Hugging Face hub
    torchrun --nproc_per_node 2 examples/train_char_lm.py  # the same on two processes

The model is an unmodified GPT2LMHeadModel and the loop an unmodified Trainer: LipschitzCallback is
the only line about Lipschitz constants. The run folder holds model/, certificate.json, metrics.json
and figure.png; a bigram model's accuracy is printed beside ours, and a generated sample at the end.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from pydoc_data import topics

import torch
from datasets import Dataset, load_dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from lip_plugin import LipschitzCallback, LipschitzConfig, certify, falsify


def read_text(options: argparse.Namespace) -> str:
    if options.dataset:
        rows = load_dataset(options.dataset, split="train")
        return "\n".join(rows["text"])
    if options.text:
        return "\n".join(load_dataset("text", data_files=options.text, split="train")["text"])
    return "\n".join(topics.topics.values())


def encode(text: str, length: int) -> tuple[Dataset, Dataset, list[str], str]:
    """Train and validation blocks of `length` characters, the vocabulary, and the validation text."""
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
    """Share of validation characters that the most frequent successor in the training text predicts."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for a, b in zip(train, train[1:]):
        counts[a][b] += 1
    best = {a: c.most_common(1)[0][0] for a, c in counts.items()}
    return sum(best.get(a) == b for a, b in zip(validation, validation[1:])) / (len(validation) - 1)


def accuracy(prediction) -> dict[str, float]:
    guess, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((guess == labels).mean())}


def draw(history: list[dict], model: torch.nn.Module, bigram: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from lip_plugin.optim.projection import block_norms

    def series(key: str) -> tuple[list, list]:
        rows = [(row["step"], row[key]) for row in history if key in row]
        return [s for s, _ in rows], [v for _, v in rows]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    left.plot(*series("loss"), label="training loss (nats)")
    left.plot(*series("eval_loss"), "o-", label="validation loss (nats)")
    left.set(xlabel="step", title="loss and accuracy")
    shares = left.twinx()
    shares.plot(*series("eval_accuracy"), "s-", color="tab:green", label="validation accuracy")
    shares.axhline(bigram, color="gray", linestyle=":", label="bigram accuracy")
    shares.set_ylim(0, 1)
    lines = left.get_lines() + shares.get_lines()
    left.legend(lines, [line.get_label() for line in lines], fontsize=8)
    middle.plot(*series("lip/log10_certificate"), label="from weights")
    middle.plot(*series("lip/log10_certificate_caps"), "--", label="from caps (holds for the whole run)")
    middle.set(xlabel="step", ylabel="log10 of the bound", title="proven Lipschitz bound, embeddings to logits")
    middle.legend(fontsize=8)
    norms = block_norms(model)
    right.barh([n.name.removeprefix("transformer.") for n in norms], [n.worst_over_cap for n in norms])
    right.axvline(1.0, color="tab:red", linestyle="--")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.set(title="largest block norm over its cap", xlim=(0, 1.1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", help="a text file to learn")
    parser.add_argument("--dataset", help="a dataset of the hub with a text column")
    parser.add_argument("--out", default="runs/char_lm", help="the run folder")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=128, help="characters in a sequence")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--w-max", type=float, default=1.0, help="cap on every block, RMS->RMS norm")
    parser.add_argument("--head-max", type=float, default=8.0, help="cap on the output head")
    parser.add_argument("--attention-scale", type=float, default=16.0, help="logits are this times q.k / d_head")
    parser.add_argument("--residual", type=float, default=0.5, help="a in x <- (1-a) x + a f(x)")
    parser.add_argument("--value-scale", type=float, default=1.0, help="factor on attention branches")
    parser.add_argument("--lr", type=float, default=0.05, help="RMS->RMS norm per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.smoke:
        options.steps, options.width, options.layers, options.length = 6, 32, 2, 32
    set_seed(options.seed)
    text = read_text(options)
    train, validation, vocabulary, held_out = encode(text, options.length)
    validation = validation.select(range(min(len(validation), 8 if options.smoke else 400)))
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(vocabulary),
            n_positions=options.length,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.heads,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    out = Path(options.out)
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=100,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        logging_steps=max(1, options.steps // 40),
        eval_strategy="steps",
        eval_steps=max(1, options.steps // 6),
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=True,
    )
    config = LipschitzConfig(
        w_max=options.w_max,
        overrides={"lm_head": options.head_max},
        attention_scale=options.attention_scale,
        residual=options.residual,
        value_scale=options.value_scale,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=[LipschitzCallback(config)],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        finish(trainer, model, out, vocabulary, bigram_accuracy(text[: -len(held_out)], held_out), options)


def finish(trainer, model, out: Path, vocabulary: list[str], bigram: float, options: argparse.Namespace) -> None:
    history = trainer.state.log_history
    trainer.save_model(str(out / "model"))
    (out / "vocabulary.json").write_text(json.dumps(vocabulary))
    (out / "metrics.json").write_text(json.dumps(history, indent=1))
    draw(history, model, bigram, out / "figure.png")
    model.eval()
    start = torch.tensor([[vocabulary.index("\n")]], device=model.device)
    sample = model.generate(
        start, max_new_tokens=options.length - 1, do_sample=True, top_k=None, pad_token_id=0, eos_token_id=-1
    )
    certificate, attack = certify(model), falsify(model, restarts=4, steps=10 if options.smoke else 60)
    last = [row for row in history if "eval_accuracy" in row][-1]
    print("".join(vocabulary[i] for i in sample[0]))
    print(certificate)
    print(f"attained by an attack (a lower bound): {attack.lower_bound:.4g}")
    print(f"from caps, for every step of the run:  10^{certify(model, 'caps').log10_lipschitz:.2f}")
    print(f"validation accuracy {last['eval_accuracy']:.1%}, a bigram model's {bigram:.1%}; see {out}/figure.png")


if __name__ == "__main__":
    main()
