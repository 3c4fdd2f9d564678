"""One LipschitzMuon step with soft cap against one torch.optim.Muon step without any projection.

    python benchmarks/muon_step.py                # GPT-2-small's 48 matrices (85 M parameters)
    python benchmarks/muon_step.py --smoke

Both step the same matrices with the same gradients, alternately in one process; the figure is the
ratio of the medians. Peak memory is measured in a process of its own for each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import resource
import statistics
import threading
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lip_plugin import LipschitzConfig, LipschitzMuon, retrofit
from lip_plugin.optim.groups import param_groups

NAMES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def matrices(width: int, layers: int, device: str) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // 64),
        vocab_size=64,
        n_positions=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(device)
    retrofit(model, LipschitzConfig(init="keep"))
    generator = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(NAMES))
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, device=device)
    return model


def ours(model: torch.nn.Module, precision: str = "float32") -> torch.optim.Optimizer:
    return LipschitzMuon(param_groups(model, 0.02, 0.02, 1e-3), lr=0.02, precision=precision)


def ours_bf16(model: torch.nn.Module) -> torch.optim.Optimizer:
    return ours(model, "bfloat16")


def theirs(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.requires_grad], lr=0.02)


OPTIMIZERS = {
    "torch.optim.Muon, no projection": theirs,
    "LipschitzMuon, soft cap": ours,
    "LipschitzMuon, soft cap, bf16": ours_bf16,
}


class PeakMemory(threading.Thread):
    """Samples this process's resident memory every 2 ms; `peak` in MiB. Linux."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.running = self.now(), True

    @staticmethod
    def now() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)


def peak_mib(name: str, width: int, layers: int, device: str, queue: multiprocessing.Queue) -> None:
    """Put the MiB that a step needs beyond weights, gradients and momentum into the queue."""
    optimizer = OPTIMIZERS[name](matrices(width, layers, device))
    optimizer.step()  # makes the state
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        optimizer.step()
        queue.put(torch.cuda.max_memory_allocated() / 2**20 - before)
        return
    before, watch = PeakMemory.now(), PeakMemory()
    watch.start()
    optimizer.step()
    watch.running = False
    queue.put(watch.peak - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.width, options.layers, options.repeats = 64, 1, 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    optimizers = {n: make(matrices(options.width, options.layers, device)) for n, make in OPTIMIZERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for repeat in range(options.repeats + 1):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {}
    context = multiprocessing.get_context("spawn")
    for name in optimizers:
        queue = context.Queue()
        child = context.Process(target=peak_mib, args=(name, options.width, options.layers, device, queue))
        child.start()
        peaks[name] = queue.get()
        child.join()
    print(f"{'optimizer':<34} {'median s':>9} {'peak MiB beyond state':>22}")
    for name, value in medians.items():
        print(f"{name:<34} {value:>9.3f} {peaks[name]:>22.0f}")
    reference, *constrained = OPTIMIZERS
    ratios = {name: medians[name] / medians[reference] for name in constrained}
    for name, ratio in ratios.items():
        print(f"{name} over {reference}: {ratio:.2f} (medians of {options.repeats} alternate steps)")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or 'cpu'}"
    print(
        json.dumps(
            {
                "benchmark": "muon_step",
                "ratios": ratios,
                "seconds": medians,
                "peak_mib": peaks,
                "device": where,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
            }
        )
    )


if __name__ == "__main__":
    main()
