"""What does the constraint cost on several processes, in time of a step and in bytes sent?

    python benchmarks/distributed_step.py                       # gloo, CPU: 1, 2 and 4 processes
    torchrun --nproc_per_node 8 benchmarks/distributed_step.py --worker   # any launcher, any device
    python benchmarks/distributed_step.py --paper               # only the estimate for 64 GPUs
    python benchmarks/distributed_step.py --smoke

Three optimizers take turns on one model, with forward pass, backward pass and step: AdamW, AdamW
with attach_projection, and LipschitzMuon; under DDP also LipschitzMuon without sharing the work
out. Ratios are of medians to the step of AdamW. Bytes are counted for each process where lip_plugin
calls torch.distributed: what leaves the process. The least possible is that an update comes to the
owner of its matrix and that the weight goes back. With --worker the first process prints.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from common import (
    MIB,
    Table,
    finish,
    headline,
    machine,
    medians,
    parsed,
    parser,
    ratios,
    recipe,
    synchronize,
    torchrun,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lip_plugin import LipschitzMuon, attach_projection, retrofit
from lip_plugin.distributed import owners as ours
from lip_plugin.linalg.polar import orthogonalize
from lip_plugin.linalg.projections import project

KINDS = ("AdamW", "AdamW, projection", "LipschitzMuon", "LipschitzMuon, not shared")
SIZES = ("width", "layers", "vocabulary", "length", "batch", "repeats")
# Assumptions of the estimate, not measurements. The model of 7B parameters has 32 layers of width
# 4096 with 32 heads, MLPs of 11008 and a vocabulary of 32000. The rate is an H100's in dense bf16,
# of which training reaches about 0.4. Links carry 50 GB/s for each GPU.
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
    """A retrofitted llama, the same on every process."""
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
    retrofit(model, recipe(gate_max=8))
    return model


def wrapped(model: nn.Module, how: str) -> nn.Module:
    """The model under DDP or FSDP2, or as it is on one process."""
    if dist.get_world_size() == 1:
        return model
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    return fully_shard(model)


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of one of KINDS."""
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
            synchronize(device)
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
    median = medians(seconds)
    return {
        "how": how,
        "processes": world,
        "seconds": median,
        "ratios": ratios(median, "AdamW"),
        "mib_sent_per_process": {k: c.bytes / options.repeats / MIB for k, c in counters.items()},
        "mib_least": least / MIB,
    }


def worker(options: argparse.Namespace) -> None:
    """What each process of a launcher does; the first one prints the rows."""
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
    """Seconds of a step of 7B parameters on 64 GPUs, computed and not measured.

    Each matrix is stepped by one of the GPUs.
    """
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
    """The rows that `worker` finds on so many processes of this machine."""
    sizes = [f"--{name}={getattr(options, name)}" for name in SIZES]
    printed = torchrun(processes, __file__, "--worker", *sizes)
    return json.loads(next(x for x in printed.splitlines() if x.startswith("ROWS "))[5:])


def parse() -> argparse.Namespace:
    made = parser(
        __doc__,
        width=512,
        layers=4,
        vocabulary=2048,
        length=256,
        batch=(2, "sequences for each process"),
        repeats=7,
    )
    made.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    made.add_argument("--worker", action="store_true", help="started by a launcher")
    made.add_argument("--paper", action="store_true", help="only the estimate")
    tiny = {"width": 64, "layers": 1, "vocabulary": 32, "length": 16}
    return parsed(made, **tiny, repeats=1, processes=[2])


def main() -> None:
    options = parse()
    if options.worker:
        worker(options)
        return
    where = machine()
    headline("a step on several processes", where)
    rows: list[dict[str, Any]] = []
    if not options.paper:
        table = Table(
            *(("how", "<8"), ("AdamW s", "8.3f"), ("+ projection", "8.2f")),
            *(("LipschitzMuon", "8.2f"), ("not shared", "8.2f"), ("MiB sent", "8.1f")),
            ("least", "8.1f"),
        )
        for processes in options.processes:
            for row in launched(processes, options):
                ratio, sent = row["ratios"], row["mib_sent_per_process"][KINDS[2]]
                times = (row["seconds"]["AdamW"], *(ratio.get(kind) for kind in KINDS[1:]))
                table.row(f"{row['how']} x {row['processes']}", *times, sent, row["mib_least"])
                rows.append(row)
    estimate = paper()
    print(
        "64 GPUs, 7B parameters, 4M tokens a step, computed (seconds): "
        + ", ".join(f"{k} {v:.3g}" for k, v in estimate.items() if k != "parameters")
    )
    sizes = {"width": options.width, "layers": options.layers}
    finish("distributed_step", where, rows=rows, paper=estimate, **sizes)


if __name__ == "__main__":
    main()
