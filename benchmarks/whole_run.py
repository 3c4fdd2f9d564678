"""What does a whole constrained run cost through Trainer, over the unconstrained one?

    python benchmarks/whole_run.py                              # two layers: minutes on a CPU
    python benchmarks/whole_run.py --layers 12 --tokens 8192 --vocabulary 50257 --device cuda
    python benchmarks/whole_run.py --smoke

From building the model to the end of train(): the retrofit, all steps, an entry in the log every 10
steps, two evaluations, two saves and the last certificate. The constrained run is the README's, a
lone LipschitzCallback(). The unconstrained one is stock GPT-2 with an untied head, torch.optim.Muon
and AdamW. Each run has a process of its own, and the kinds take turns. The figures are medians over
the rounds and their ratio; peak memory is that of the process, or of the device (CUDA).
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from typing import Any

import torch
from common import (
    MIB,
    Table,
    finish,
    headline,
    in_own_process,
    machine,
    medians,
    parsed,
    parser,
    ratios,
)
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from twins import MuonAndAdamW, muon_precision

from lip_plugin import LipschitzCallback

KINDS = ("unconstrained", "constrained")


def built(kind: str, options: argparse.Namespace, folder: str) -> Trainer:
    """The Trainer of one of KINDS, with fresh weights and random tokens."""
    length = min(options.tokens, options.length)
    torch.manual_seed(0)
    sizes = {"n_embd": options.width, "n_layer": options.layers, "n_positions": length}
    config = GPT2Config(
        **sizes,
        n_head=max(1, options.width // 64),
        vocab_size=options.vocabulary,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = torch.randint(
        options.vocabulary, (64, length), generator=torch.Generator().manual_seed(0)
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=max(1, options.tokens // length),
        per_device_eval_batch_size=max(1, options.tokens // length),
        max_steps=options.steps,
        learning_rate=0.02,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=max(1, options.steps // 2),
        save_strategy="steps",
        save_steps=max(1, options.steps // 2),
        report_to="none",
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=False,
        bf16=options.bf16,
    )
    sets: dict[str, Any] = {"train_dataset": data, "eval_dataset": data[:8]}
    model = GPT2LMHeadModel(config)
    if kind == "constrained":
        return Trainer(model, args, callbacks=[LipschitzCallback()], **sets)
    model = model.to(args.device)
    return Trainer(model, args, optimizers=(MuonAndAdamW(model), None), **sets)


def run(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of building and of training, and peak memory in MiB."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        trainer = built(kind, options, folder)
        ready = time.perf_counter()
        trainer.train()
        if options.device != "cpu":
            torch.accelerator.synchronize()
        done = time.perf_counter()
        history = trainer.state.log_history
    certifying = max((e.get("lip/seconds_certifying", 0.0) for e in history), default=0.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / MIB
    entries = sum("lip/certificate" in e for e in history)
    return {
        "building": ready - began,
        "training": done - ready,
        "whole": done - began,
        "log_entries": certifying,
        "certificates_in_log": entries,
        "peak_mib": peak,
    }


def parse() -> argparse.Namespace:
    made = parser(
        __doc__,
        device=True,
        width=768,
        layers=2,
        vocabulary=(512, "tokens; the head is a constrained matrix"),
        length=(256, "tokens in a sequence, at most"),
        tokens=(512, "in a step"),
        steps=20,
        rounds=(3, "runs of each kind"),
        threads=torch.get_num_threads(),
    )
    made.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    return parsed(made, width=64, layers=1, vocabulary=32, tokens=16, steps=4, rounds=1)


def main() -> None:
    options = parse()
    where = {**machine(options.device), "muon_precision": muon_precision(options.device)}
    headline("a whole run through Trainer", where)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for kind in KINDS:
            found[kind].append(in_own_process(run, kind, options))
    table = Table(
        *(("seconds", "<12"), ("unconstrained", "13.2f"), ("constrained", "11.2f")),
        ("ratio", "6.3f"),
    )
    rows = {}
    for key in found[KINDS[0]][0]:
        middle = medians({kind: [row[key] for row in found[kind]] for kind in KINDS})
        ratio = ratios(middle, KINDS[0])[KINDS[1]] if middle[KINDS[0]] else float("nan")
        rows[key] = {**middle, "ratio": ratio}
        table.row(key, *(middle[kind] for kind in KINDS), ratio)
    names = ("layers", "width", "vocabulary", "tokens", "steps", "rounds")
    sizes = {key: getattr(options, key) for key in names}
    finish("whole_run", where, rows=rows, **sizes)


if __name__ == "__main__":
    main()
