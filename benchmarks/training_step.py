"""What does a whole constrained training step cost through Trainer, over the unconstrained one?

    python benchmarks/training_step.py                # one layer: minutes on a CPU
    python benchmarks/training_step.py --layers 12 --tokens 8192 --vocabulary 50257 --device cuda
    python benchmarks/training_step.py --smoke

Both models have the width of GPT-2 small. The constrained run has LipschitzCallback, as the README
shows (retrofit, LipschitzMuon, the default method). The unconstrained run is stock GPT-2 with an
untied head, which the retrofit unties as well, so that both have the same parameters. It has
torch.optim.Muon for the matrices that the other one constrains, and AdamW for the rest.

Two Trainers in one process take turns of a few steps, each in its own thread, of which one runs at
a time. A step is timed from on_step_begin to on_step_end, so that logging, certificates and data
loading are left out. What a log entry with its certificate costs is given apart. Peak memory is
that of one step, in separate processes. The optimizers cost the same at any number of tokens, so
the ratio tends to that of the forward and backward passes as tokens grow.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    Seconds,
    Table,
    cpu,
    finish,
    headline,
    in_own_process,
    machine,
    parsed,
    parser,
    ratios,
    wall,
)
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from twins import MuonAndAdamW, muon_precision

from lip_plugin import LipschitzCallback

KINDS = ("unconstrained", "constrained")


class Turns(TrainerCallback):
    """Lets one of two Trainers run at a time, `block` steps each, and times its steps."""

    def __init__(
        self, number: int, block: int, turn: list[int], changed: threading.Condition
    ) -> None:
        self.number, self.block, self.turn, self.changed = number, block, turn, changed
        self.seconds: list[Seconds] = []
        self.began = (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn[0] in (self.number, -1))
        self.began = time.perf_counter(), time.thread_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter(), time.thread_time()
        self.seconds.append(Seconds(now[0] - self.began[0], now[1] - self.began[1]))
        if state.global_step % self.block == 0:
            self.pass_on(1 - self.number)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pass_on(1 - self.number)

    def pass_on(self, number: int) -> None:
        """Let the other one run."""
        with self.changed:
            if self.turn[0] != -1:
                self.turn[0] = number
            self.changed.notify_all()


def trainer(
    kind: str, tokens: int, steps: int, options: argparse.Namespace, folder: str
) -> Trainer:
    """The Trainer of one of KINDS, with fresh weights."""
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


def interleaved(tokens: int, options: argparse.Namespace) -> tuple[dict[str, list[Seconds]], float]:
    """The times of each kind's steps, and the seconds that the constrained run took to certify.

    It certifies once, for its one log entry.
    """
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
    # The first block is a warm-up.
    times = {kind: its.seconds[options.block :] for kind, its in zip(KINDS, turns, strict=True)}
    return times, certifying


class Peak(TrainerCallback):
    """MiB that the last step takes at most, of the device (CUDA) or of the process (Linux)."""

    def __init__(self, on_device: bool) -> None:
        self.on_device, self.mib = on_device, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.on_device:
            torch.cuda.reset_peak_memory_stats()
        else:  # VmHWM starts again from what is resident now
            Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.on_device:
            self.mib = torch.cuda.max_memory_allocated() / MIB
        else:
            status = Path("/proc/self/status").read_text()
            self.mib = int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_mib(kind: str, tokens: int, options: argparse.Namespace) -> float:
    """The MiB that the third step takes at most, without the retrofit and the last certificate."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        one, peak = trainer(kind, tokens, 3, options, folder), Peak(options.device == "cuda")
        one.args.logging_steps = 10**9
        one.add_callback(peak)
        one.train()
    return peak.mib


def parse() -> argparse.Namespace:
    made = parser(
        __doc__,
        device=True,
        width=768,
        layers=1,
        vocabulary=(512, "tokens; the head is a constrained matrix"),
        length=(256, "tokens in a sequence, at most"),
        block=(1, "steps in a turn"),
        rounds=(5, "turns that count, of each"),
        threads=torch.get_num_threads(),
    )
    made.add_argument("--tokens", type=int, nargs="+", default=[64, 512], help="per step")
    made.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    return parsed(made, width=64, layers=1, vocabulary=32, tokens=[16], rounds=2, block=1)


def measure(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians, ratios and peaks for one number of tokens."""
    times, certifying = interleaved(tokens, options)
    seconds, used = wall(times), cpu(times)
    peaks = {kind: in_own_process(peak_mib, kind, tokens, options) for kind in KINDS}
    return {
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": used,
        "ratio": ratios(seconds, KINDS[0])[KINDS[1]],
        "cpu_ratio": ratios(used, KINDS[0])[KINDS[1]],
        "peak_mib": peaks,
        "memory_ratio": ratios(peaks, KINDS[0])[KINDS[1]],
        "seconds_certifying_per_log": certifying,
    }


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    where = {**machine(options.device), "muon_precision": muon_precision(options.device)}
    headline("a training step through Trainer", where)
    table = Table(
        *(("tokens", "6"), ("unconstrained s", ".3f"), ("constrained s", ".3f")),
        *(("ratio", "6.3f"), ("CPU ratio", "6.3f"), ("memory ratio", "6.3f")),
    )
    rows = []
    for tokens in options.tokens:
        row = measure(tokens, options)
        rows.append(row)
        seconds = (row["seconds"][kind] for kind in KINDS)
        table.row(tokens, *seconds, *(row[key] for key in ("ratio", "cpu_ratio", "memory_ratio")))
    sizes = {key: getattr(options, key) for key in ("layers", "width", "vocabulary")}
    finish("training_step", where, rows=rows, **sizes)


if __name__ == "__main__":
    main()
