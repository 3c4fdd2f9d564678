"""What the constraint costs on several processes: time of a step, and bytes on the wire against the least possible.

    python benchmarks/distributed_step.py                       # gloo on this machine's CPU: 1, 2 and 4 processes
    torchrun --nproc_per_node 8 benchmarks/distributed_step.py --worker   # any launcher, any device: prints from rank 0
    python benchmarks/distributed_step.py --paper               # only the estimate for 64 GPUs and 7B parameters
    python benchmarks/distributed_step.py --smoke

Three optimizers on one model, forward, backward and step, in turns in one process each: AdamW, AdamW with
attach_projection, LipschitzMuon; for LipschitzMuon under DDP once more without sharing the work out. Ratios of medians to
AdamW's step. Bytes are counted at the calls of torch.distributed that lip_plugin makes, for each process: what
leaves it. The least possible: an update has to come to the owner of its matrix, and the weight back.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lip_plugin import LipschitzConfig, LipschitzMuon, attach_projection, retrofit
from lip_plugin.distributed.owners import owners as ours
from lip_plugin.linalg.polar import orthogonalize
from lip_plugin.linalg.projections import project

KINDS = ("AdamW", "AdamW, projection", "LipschitzMuon", "LipschitzMuon, not shared")
# 7B: 32 layers of width 4096 with 32 heads, MLPs of 11008, a vocabulary of 32000. An H100's dense bf16 rate, of which
# training reaches about 0.4; links of 50 GB/s for each GPU. Assumptions of the estimate, not measurements.
PAPER = {
    "gpus": 64,
    "layers": 32,
    "width": 4096,
    "inner": 11008,
    "heads": 32,
    "vocabulary": 32000,
    "tokens": 4_000_000,
}
RATE, REACHED, WIRE = 989e12, 0.4, 50e9


def model_of(options: argparse.Namespace, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        max_position_embeddings=options.length,
    )
    model = LlamaForCausalLM(config).to(device)
    retrofit(model, LipschitzConfig(gate_max=8))
    return model


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if dist.get_world_size() == 1:
        return model
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    return fully_shard(model)


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind.startswith("LipschitzMuon"):
        made = LipschitzMuon(model, lr=0.02)
        if kind.endswith("not shared"):
            made.process_group = None
        return made
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if kind.endswith("projection"):
        attach_projection(optimizer, model)
    return optimizer


class Counter:
    """Bytes that leave this process in the exchanges of lip_plugin."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        exchange, gather = dist.all_to_all_single, ours._all_gather

        def counted_exchange(
            out: Any, into: Any, received: Any, sent: Any, group: Any = None
        ) -> Any:
            away = sum(sent) - sent[dist.get_rank(group)]
            self.bytes += away * into.element_size()
            return exchange(out, into, received, sent, group=group)

        def counted_gather(out: Any, into: Any, group: Any = None) -> Any:
            self.bytes += into.numel() * into.element_size() * (dist.get_world_size(group) - 1)
            return gather(out, into, group=group)

        dist.all_to_all_single, ours._all_gather = counted_exchange, counted_gather
        try:
            yield
        finally:
            dist.all_to_all_single, ours._all_gather = exchange, gather


def measured(how: str, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Medians of each kind's step, and of the bytes that LipschitzMuon sends."""
    kinds = [k for k in KINDS if how == "ddp" or not k.endswith("not shared")]
    models = {k: wrapped(model_of(options, device), how) for k in kinds}
    optimizers = {k: optimizer_of(k, models[k]) for k in kinds}
    seconds: dict[str, list[float]] = {k: [] for k in kinds}
    counters = {k: Counter() for k in kinds}
    ids = torch.randint(options.vocabulary, (options.batch, options.length), device=device)
    for repeat in range(options.repeats + 1):
        for kind in kinds:
            dist.barrier()
            began = time.perf_counter()
            models[kind](input_ids=ids, labels=ids).loss.backward()
            with counters[kind].watching():
                optimizers[kind].step()
            optimizers[kind].zero_grad()
            if device != "cpu":
                torch.cuda.synchronize()
            dist.barrier()
            if repeat:
                seconds[kind].append(time.perf_counter() - began)
            else:
                counters[kind].bytes = 0
    world = dist.get_world_size()
    matrices = sum(
        p.numel() * 4
        for n, p in models["AdamW"].named_parameters()
        if p.dim() == 2 and "embed_tokens" not in n
    )
    share = (
        (world - 1) / world * matrices / world if how == "fsdp" else (world - 1) * matrices / world
    )
    least = {"fsdp": 2 * share, "ddp": share}[how]
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    return {
        "how": how,
        "processes": world,
        "seconds": medians,
        "ratios": {k: v / medians["AdamW"] for k, v in medians.items()},
        "mib_sent_per_process": {k: c.bytes / options.repeats / 2**20 for k, c in counters.items()},
        "mib_least": least / 2**20,
    }


def worker(options: argparse.Namespace) -> None:
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group()
    hows = ("ddp",) if dist.get_world_size() == 1 else ("ddp", "fsdp")
    rows = [measured(how, options, device) for how in hows]
    if dist.get_rank() == 0:
        print("ROWS " + json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def paper() -> dict[str, float]:
    """Seconds of a step of 7B parameters on 64 GPUs, each matrix stepped by one of them: computed, not measured."""
    small = 16  # the operations of shapes a sixteenth as wide, times 16^3
    w, inner, head = (
        PAPER["width"] // small,
        PAPER["inner"] // small,
        PAPER["width"] // PAPER["heads"] // small,
    )
    shapes = [(3 * PAPER["heads"], head, w), (1, w, w), (2, inner, w), (1, w, inner)]
    with FlopCounterMode(display=False) as counter:
        for count, d_out, d_in in shapes:
            blocks = torch.randn(count, d_out, d_in)
            step = orthogonalize(blocks, steps=5, check_finite=False)
            project(step, 1.0, norm_upper=1.02)
    flops = counter.get_total_flops() * small**3 * PAPER["layers"]
    parameters = PAPER["layers"] * (4 * PAPER["width"] ** 2 + 3 * PAPER["width"] * PAPER["inner"])
    total = parameters + 2 * PAPER["vocabulary"] * PAPER["width"]
    gpus = PAPER["gpus"]
    return {
        "parameters": float(total),
        "forward_backward": 6.0 * total * PAPER["tokens"] / gpus / RATE / REACHED,
        "steps_of_matrices": flops / gpus / RATE / REACHED,
        "exchange": 3 * 4.0 * parameters / gpus / WIRE,
        "exchange_least": 2 * 4.0 * parameters / gpus / WIRE,
    }


def launched(processes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    sizes = [
        f"--{k}={getattr(options, k)}"
        for k in ("width", "layers", "vocabulary", "length", "batch", "repeats")
    ]
    result = subprocess.run(
        [*command, __file__, "--worker", *sizes],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("ROWS ")]
    if result.returncode or not lines:
        raise SystemExit(result.stderr[-3000:])
    return json.loads(lines[0][5:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (
        ("width", 512),
        ("layers", 4),
        ("vocabulary", 2048),
        ("length", 256),
        ("batch", 2),
        ("repeats", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker", action="store_true", help="started by a launcher")
    parser.add_argument("--paper", action="store_true", help="only the estimate")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.width, options.layers, options.vocabulary, options.length = 64, 1, 32, 16
        options.repeats, options.processes = 1, [2]
    return options


def main() -> None:
    options = parse()
    if options.worker:
        worker(options)
        return
    rows = [] if options.paper else [row for n in options.processes for row in launched(n, options)]
    if rows:
        names = ("AdamW s", "+ projection", "LipschitzMuon", "not shared", "MiB sent", "least")
        print(" " * 10 + "".join(f"{name:>15}" for name in names))
    for row in rows:
        ratio, sent = row["ratios"], row["mib_sent_per_process"]
        alone = f"{ratio[KINDS[3]]:.2f}" if KINDS[3] in ratio else "-"
        print(
            f"{row['how']:<5} x {row['processes']:<2}{row['seconds']['AdamW']:>15.3f}{ratio[KINDS[1]]:>15.2f}"
            f"{ratio[KINDS[2]]:>15.2f}{alone:>15}{sent[KINDS[2]]:>15.1f}{row['mib_least']:>15.1f}"
        )
    estimate = paper()
    print(
        "64 GPUs, 7B parameters, 4M tokens a step, computed (seconds): "
        + ", ".join(f"{k} {v:.3g}" for k, v in estimate.items() if k != "parameters")
    )
    result = {
        "benchmark": "distributed_step",
        "rows": rows,
        "paper": estimate,
        "width": options.width,
        "layers": options.layers,
    }
    result |= {"device": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({**result, "date": datetime.date.today().isoformat()}))


if __name__ == "__main__":
    main()
