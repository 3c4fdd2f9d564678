"""A whole constrained training step through Trainer against the unconstrained one with the same optimizer.

    python benchmarks/training_step.py                      # GPT-2-small's width, 1 layer, few tokens: minutes on a CPU
    python benchmarks/training_step.py --layers 12 --tokens 8192 --vocabulary 50257 --device cuda
    python benchmarks/training_step.py --smoke

Constrained: LipschitzCallback, as the README shows (retrofit, LipschitzMuon, soft cap). Unconstrained: stock GPT-2
with an untied head, which the retrofit unties as well, so that both have the same parameters; torch.optim.Muon for
the matrices that the other constrains, AdamW for the rest. Two Trainers in one process take turns of a few steps,
each in its own thread, of which one runs at a time; a step is timed from on_step_begin to on_step_end, so
logging, certificates and data loading are left out. What a log entry with its certificate costs is given apart. Peak
memory is that of one step, in separate processes. The optimizers cost the same at any number of tokens, so the
ratio tends to that of the forward and backward passes as tokens grow.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from lip_plugin import LipschitzCallback

KINDS = ("unconstrained", "constrained")


class MuonAndAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for matrices inside the blocks and for the head, AdamW for the rest, as one optimizer."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.dim() == 2 and "wte" not in n and "wpe" not in n]
        rest = [p for _, p in named if all(p is not m for m in matrices)]
        super().__init__(matrices + rest, {"lr": 0.02})
        self.parts = (torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3))
        self.param_groups = [
            group for part in self.parts for group in part.param_groups
        ]  # shared: schedulers

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


class Turns(TrainerCallback):
    """Lets one of two Trainers run at a time, `block` steps each, and times its steps."""

    def __init__(
        self, number: int, block: int, turn: list[int], changed: threading.Condition
    ) -> None:
        self.number, self.block, self.turn, self.changed = number, block, turn, changed
        self.seconds: list[tuple[float, float]] = []
        self.began = (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn[0] in (self.number, -1))
        self.began = time.perf_counter(), time.thread_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - self.began[0], time.thread_time() - self.began[1]
        self.seconds.append((wall, cpu))
        if state.global_step % self.block == 0:
            self.pass_on(1 - self.number)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pass_on(1 - self.number)

    def pass_on(self, number: int) -> None:
        with self.changed:
            if self.turn[0] != -1:
                self.turn[0] = number
            self.changed.notify_all()


def trainer(
    kind: str, tokens: int, steps: int, options: argparse.Namespace, folder: str
) -> Trainer:
    length = min(tokens, options.length)
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=options.width,
        n_layer=options.layers,
        n_head=max(1, options.width // 64),
        vocab_size=options.vocabulary,
        n_positions=length,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    ids = torch.randint(
        options.vocabulary, (64, length), generator=torch.Generator().manual_seed(0)
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=max(1, tokens // length),
        max_steps=steps,
        learning_rate=0.02,
        logging_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=False,
        bf16=options.bf16,
    )
    if kind == "constrained":
        return Trainer(model, args, train_dataset=data, callbacks=[LipschitzCallback()])
    model = model.to(args.device)
    return Trainer(model, args, train_dataset=data, optimizers=(MuonAndAdamW(model), None))


def interleaved(
    tokens: int, options: argparse.Namespace
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """((wall, CPU) seconds of each kind's steps, seconds of the constrained run's certificates for its one log entry)."""
    turn, changed = [0], threading.Condition()
    steps = options.block * (options.rounds + 1)
    turns = [Turns(number, options.block, turn, changed) for number in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        trainers = [trainer(kind, tokens, steps, options, folder) for kind in KINDS]
        failures: list[BaseException] = []

        def train(one: Trainer) -> None:
            try:
                one.train()
            except BaseException as error:
                failures.append(error)
                turn[0] = -1  # let the other one finish
                turns[0].pass_on(-1)

        for one, its in zip(trainers, turns, strict=True):
            one.add_callback(its)
        threads = [threading.Thread(target=train, args=(one,)) for one in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
    history = trainers[1].state.log_history
    certifying = max(
        (float(entry.get("lip/seconds_certifying", 0.0)) for entry in history), default=0.0
    )
    # the first block is a warm-up
    return {
        kind: its.seconds[options.block :] for kind, its in zip(KINDS, turns, strict=True)
    }, certifying


class Peak(TrainerCallback):
    """MiB that the last step takes at most: of the device (CUDA), or of the whole process (Linux)."""

    def __init__(self, on_device: bool) -> None:
        self.on_device, self.mib = on_device, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.on_device:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text(
                "5"
            )  # VmHWM starts again from what is resident now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.on_device:
            self.mib = torch.cuda.max_memory_allocated() / 2**20
        else:
            self.mib = (
                int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
            )


def peak_mib(
    kind: str, tokens: int, options: argparse.Namespace, queue: multiprocessing.Queue
) -> None:
    """Put the MiB that the third step takes at most into the queue: not the retrofit, nor the certificate at the end."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        one, peak = trainer(kind, tokens, 3, options, folder), Peak(options.device == "cuda")
        one.args.logging_steps = 10**9
        one.add_callback(peak)
        one.train()
    queue.put(peak.mib)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512], help="per step")
    for name, default, text in (
        ("width", 768, "of the model"),
        ("layers", 1, "of the model"),
        ("vocabulary", 512, "tokens; the head is a constrained matrix"),
        ("length", 256, "tokens in a sequence, at most"),
        ("block", 1, "steps in a turn"),
        ("rounds", 5, "turns that count, of each"),
        ("threads", torch.get_num_threads(), "of torch"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.width, options.layers, options.vocabulary = 64, 1, 32
        options.tokens, options.rounds, options.block = [16], 2, 1
    return options


def measure(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians, ratios and peaks for one number of tokens."""
    seconds, certifying = interleaved(tokens, options)
    wall = {kind: statistics.median(w for w, _ in values) for kind, values in seconds.items()}
    cpu = {kind: statistics.median(c for _, c in values) for kind, values in seconds.items()}
    peaks = {}
    context = multiprocessing.get_context("spawn")
    for kind in KINDS:
        queue = context.Queue()
        child = context.Process(target=peak_mib, args=(kind, tokens, options, queue))
        child.start()
        peaks[kind] = queue.get()
        child.join()
    return {
        "tokens": tokens,
        "seconds": wall,
        "cpu_seconds": cpu,
        "ratio": wall["constrained"] / wall["unconstrained"],
        "cpu_ratio": cpu["constrained"] / cpu["unconstrained"],
        "peak_mib": peaks,
        "memory_ratio": peaks["constrained"] / peaks["unconstrained"],
        "seconds_certifying_per_log": certifying,
    }


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rows = [measure(tokens, options) for tokens in options.tokens]
    print(
        f"{'tokens':>7} {'unconstrained s':>16} {'constrained s':>14} {'ratio':>6} {'CPU ratio':>10} {'memory ratio':>13}"
    )
    for row in rows:
        free, held = (row["seconds"][kind] for kind in KINDS)
        print(
            f"{row['tokens']:>7} {free:>16.3f} {held:>14.3f} {row['ratio']:>6.3f} {row['cpu_ratio']:>10.3f} "
            f"{row['memory_ratio']:>13.3f}"
        )
    result = {
        "benchmark": "training_step",
        "rows": rows,
        "layers": options.layers,
        "width": options.width,
        "vocabulary": options.vocabulary,
        "device": torch.cuda.get_device_name()
        if options.device == "cuda"
        else platform.processor() or "cpu",
        "threads": options.threads,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
