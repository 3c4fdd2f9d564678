"""One LipschitzMuon step with soft cap against one torch.optim.Muon step without any projection.

    python benchmarks/muon_step.py                # GPT-2-small's 48 matrices (85 M parameters)
    python benchmarks/muon_step.py --layers 3     # 12 of them: the same ratio, in a quarter of the time
    python benchmarks/muon_step.py --peers        # with heavyball's and pytorch_optimizer's Muon, if installed
    python benchmarks/muon_step.py --smoke

All step the same matrices with the same gradients, alternately in one process; the figure is the
ratio of the medians, of wall time and of this process's CPU time (which a busy machine disturbs less).
Peak memory is measured in a process of its own for each. On CUDA also the share that orthogonalize and
soft cap reach of the rate of an 8192^3 bf16 product measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from lip_plugin import LipschitzConfig, LipschitzMuon, retrofit
from lip_plugin.linalg.polar import orthogonalize
from lip_plugin.linalg.projections import project
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


def ours(precision: str | None) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return LipschitzMuon(param_groups(model, 0.02, 0.02, 1e-3), lr=0.02, precision=precision)

    return make


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def theirs(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon(trainable(model), lr=0.02)


def heavyballs(model: torch.nn.Module) -> Any:
    return importlib.import_module("heavyball").Muon(trainable(model), lr=0.02)


def pytorch_optimizers(model: torch.nn.Module) -> Any:
    groups = [{"params": trainable(model), "use_muon": True}]
    return importlib.import_module("pytorch_optimizer").Muon(groups, lr=0.02)


def pytorch_optimizers_gram(model: torch.nn.Module) -> Any:
    groups = [{"params": trainable(model), "use_muon": True}]
    return importlib.import_module("pytorch_optimizer").Muon(
        groups, lr=0.02, ns_method="gram_newton_schulz"
    )


REFERENCE = "torch.optim.Muon, no projection"
OPTIMIZERS: dict[str, Callable[[torch.nn.Module], Any]] = {
    REFERENCE: theirs,
    "LipschitzMuon, soft cap": ours(None),
    "LipschitzMuon, soft cap, float32": ours("float32"),
}
PEERS: dict[str, tuple[str, Callable[[torch.nn.Module], Any]]] = {
    "heavyball.Muon (compiled)": ("heavyball", heavyballs),
    "pytorch_optimizer.Muon": ("pytorch_optimizer", pytorch_optimizers),
    "pytorch_optimizer.Muon, Gram": ("pytorch_optimizer", pytorch_optimizers_gram),
}


def chosen(peers: bool) -> dict[str, Callable[[torch.nn.Module], Any]]:
    """The optimizers to compare; peers that are not installed are named and left out."""
    found = dict(OPTIMIZERS)
    for name, (package, make) in PEERS.items() if peers else ():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: {package} is not installed, left out")
        else:
            found[f"{name} {importlib.metadata.version(package)}"] = make
    return found


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


def peak_mib(
    name: str, peers: bool, width: int, layers: int, device: str, queue: multiprocessing.Queue
) -> None:
    """Put the MiB that a step needs beyond weights, gradients and momentum into the queue."""
    model = matrices(width, layers, device)
    optimizer = chosen(peers)[name](model)
    gradients = [p.grad for p in trainable(model)]
    optimizer.step()  # makes the state
    restore(model, gradients)
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


def restore(model: torch.nn.Module, gradients: list[Any]) -> None:
    """Some optimizers take the gradients away."""
    for p, gradient in zip(trainable(model), gradients, strict=True):
        p.grad = gradient


def rate_of(call: Callable[[], Any], repeats: int = 10) -> float:
    """Floating-point operations of the matrix products in `call`, as executed, per second of CUDA time."""
    with FlopCounterMode(display=False) as counter:
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return counter.get_total_flops() * repeats / (time.perf_counter() - began)


def shares_of_peak() -> dict[str, float]:
    """Which share of a plain bf16 product's rate orthogonalize and soft cap reach on GPT-2-small's shapes; CUDA."""
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = rate_of(lambda: square @ square)
    shares = {"peak TFLOP/s": peak / 1e12}
    for count, d_out, d_in in ((432, 64, 768), (12, 768, 768), (12, 3072, 768), (12, 768, 3072)):
        blocks = torch.randn(count, d_out, d_in, device="cuda")
        shape = f"{count} x {d_out} x {d_in}"
        shares[f"orthogonalize {shape}"] = (
            rate_of(lambda b=blocks: orthogonalize(b, steps=5, check_finite=False)) / peak
        )
        shares[f"soft cap {shape}"] = (
            rate_of(lambda b=blocks: project(b, 1.0, norm_upper=1.02)) / peak
        )
    return shares


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--peers", action="store_true", help="compare peers that are installed, too"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.width, options.layers, options.repeats = 64, 1, 2
    return options


def timed(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each optimizer's steps, alternately."""
    models = {
        n: matrices(options.width, options.layers, options.device) for n in chosen(options.peers)
    }
    optimizers = {n: make(models[n]) for n, make in chosen(options.peers).items()}
    gradients = {n: [p.grad for p in trainable(model)] for n, model in models.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in optimizers}
    for repeat in tqdm(range(options.repeats + 1), desc="rounds", disable=options.smoke):
        for name, optimizer in optimizers.items():
            restore(models[name], gradients[name])
            began, cpu = time.perf_counter(), time.process_time()
            optimizer.step()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is a warm-up
                seconds[name].append((time.perf_counter() - began, time.process_time() - cpu))
    return seconds


def main() -> None:
    options = parse()
    seconds = timed(options)
    medians = {
        name: statistics.median(wall for wall, _ in values) for name, values in seconds.items()
    }
    cpu = {name: statistics.median(used for _, used in values) for name, values in seconds.items()}
    peaks = {}
    context = multiprocessing.get_context("spawn")
    for name in medians:
        queue = context.Queue()
        arguments = (name, options.peers, options.width, options.layers, options.device, queue)
        child = context.Process(target=peak_mib, args=arguments)
        child.start()
        peaks[name] = queue.get()
        child.join()
    ratios = {name: medians[name] / medians[REFERENCE] for name in medians}
    cpu_ratios = {name: cpu[name] / cpu[REFERENCE] for name in cpu}
    print(
        f"{'optimizer':<38} {'median s':>9} {'ratio':>6} {'CPU s':>7} {'ratio':>6} {'peak MiB beyond state':>22}"
    )
    for name in medians:
        print(
            f"{name:<38} {medians[name]:>9.3f} {ratios[name]:>6.2f} {cpu[name]:>7.3f} {cpu_ratios[name]:>6.2f} "
            f"{peaks[name]:>22.0f}"
        )
    print(f"ratios to {REFERENCE}: medians of {options.repeats} alternate steps")
    shares = shares_of_peak() if options.device == "cuda" else {}
    for name, share in shares.items():
        print(f"{name}: {share:.3f}")
    where = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"{platform.processor() or 'cpu'}"
    )
    result = {
        "benchmark": "muon_step",
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
        "seconds": medians,
        "peak_mib": peaks,
        "shares_of_peak": shares,
        "device": where,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
