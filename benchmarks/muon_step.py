"""What does a step of LipschitzMuon cost, over a step of torch.optim.Muon without any projection?

    python benchmarks/muon_step.py                # GPT-2 small's 48 matrices (85 M parameters)
    python benchmarks/muon_step.py --layers 3     # 12 of them: the same ratio, sooner
    python benchmarks/muon_step.py --peers        # with heavyball's and pytorch_optimizer's Muon
    python benchmarks/muon_step.py --smoke

All optimizers step the same matrices with the same gradients, in turns in one process.
LipschitzMuon projects by soft cap. The figure is the ratio of the medians, of wall time and of this
process's CPU time, which a busy machine disturbs less. Peak memory is measured in a process of its
own for each. On CUDA there is also the share that orthogonalize and soft cap reach of the rate of
an 8192^3 bf16 product that is measured in the same run. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    Table,
    cpu,
    finish,
    headline,
    in_own_process,
    in_turns,
    machine,
    parsed,
    parser,
    ratios,
    recipe,
    wall,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel
from twins import TorchMuon

from lip_plugin import LipschitzMuon, retrofit
from lip_plugin.linalg.polar import orthogonalize
from lip_plugin.linalg.projections import project
from lip_plugin.optim.groups import param_groups

NAMES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def matrices(width: int, layers: int, device: str) -> GPT2LMHeadModel:
    """A retrofitted GPT-2 of which only the matrices train, with gradients."""
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
    retrofit(model, recipe(init="keep"))
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
    return TorchMuon(trainable(model), lr=0.02)


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
        return pages * resource.getpagesize() / MIB

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)


def peak_mib(name: str, peers: bool, width: int, layers: int, device: str) -> float:
    """The MiB that a step needs beyond weights, gradients and momentum."""
    model = matrices(width, layers, device)
    optimizer = chosen(peers)[name](model)
    gradients = [p.grad for p in trainable(model)]
    optimizer.step()  # makes the state
    restore(model, gradients)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
        optimizer.step()
        return torch.cuda.max_memory_allocated() / MIB - before
    now, watch = PeakMemory.now(), PeakMemory()
    watch.start()
    optimizer.step()
    watch.running = False
    return watch.peak - now


def restore(model: torch.nn.Module, gradients: list[Any]) -> None:
    """Give the gradients back, which some optimizers take away."""
    for p, gradient in zip(trainable(model), gradients, strict=True):
        p.grad = gradient


def rate_of(call: Callable[[], Any], repeats: int = 10) -> float:
    """Floating-point operations of the matrix products in `call`, per second of CUDA time."""
    with FlopCounterMode(display=False) as counter:
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return counter.get_total_flops() * repeats / (time.perf_counter() - began)


def shares_of_peak() -> dict[str, float]:
    """The share of a plain bf16 product's rate that orthogonalize and soft cap reach.

    On the shapes of GPT-2 small, with CUDA.
    """
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
    made = parser(__doc__, device=True, repeats=7, width=768, layers=12)
    made.add_argument("--peers", action="store_true", help="compare peers that are installed, too")
    return parsed(made, width=64, layers=1, repeats=2)


def main() -> None:
    options = parse()
    where = machine(options.device)
    headline("a step of LipschitzMuon", where)
    shape = (options.width, options.layers, options.device)
    models = {name: matrices(*shape) for name in chosen(options.peers)}
    gradients = {name: [p.grad for p in trainable(model)] for name, model in models.items()}
    steps = {name: make(models[name]).step for name, make in chosen(options.peers).items()}
    times = in_turns(
        steps,
        options.repeats,
        options.device,
        before=lambda name: restore(models[name], gradients[name]),
        title=None if options.smoke else "rounds",
    )
    seconds, used = wall(times), cpu(times)
    wall_ratios, cpu_ratios = ratios(seconds, REFERENCE), ratios(used, REFERENCE)
    peaks = {}
    table = Table(
        *(("optimizer", "<34"), ("median s", "8.3f"), ("ratio", "5.2f"), ("CPU s", "7.3f")),
        *(("ratio", "5.2f"), ("peak MiB beyond state", ".0f")),
    )
    for name in times:
        peaks[name] = in_own_process(peak_mib, name, options.peers, *shape)
        row = (seconds[name], wall_ratios[name], used[name], cpu_ratios[name], peaks[name])
        table.row(name, *row)
    print(f"ratios to {REFERENCE}: medians of {options.repeats} alternate steps")
    shares = shares_of_peak() if options.device == "cuda" else {}
    for name, share in shares.items():
        print(f"{name}: {share:.3f}")
    finish(
        "muon_step",
        where,
        ratios=wall_ratios,
        cpu_ratios=cpu_ratios,
        seconds=seconds,
        peak_mib=peaks,
        shares_of_peak=shares,
    )


if __name__ == "__main__":
    main()
