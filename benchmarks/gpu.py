"""Everything that only a GPU can tell, in ten minutes on one of them, most important first.

    python benchmarks/gpu.py                       # all of it; rows go to docs/gpu.jsonl
    python benchmarks/gpu.py --only correctness synchronizations
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --smoke               # at toy size, on a CPU too

Each part appends one JSON line as soon as it is done, so that nothing is lost when time runs out. A
part that would begin after `--seconds` is left out, and said. Parts that are benchmarks of their
own are run as a user would run them, and their last line is the row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, character_gpt2, finish, headline, machine, parser, synchronize
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from lip_plugin import LipschitzMuon, certify, falsify, retrofit
from tests.support.families import HF_FAMILIES, tiny

RESULTS = ROOT / "docs" / "gpu.jsonl"


def correctness(options: argparse.Namespace) -> dict[str, Any]:
    """Families: a step keeps the caps, lower <= upper, and a saved model certifies the same."""
    found = {}
    families = HF_FAMILIES[:2] if options.smoke else HF_FAMILIES
    for family in tqdm(families, desc="families"):
        torch.manual_seed(0)
        model = tiny(family)
        retrofit(model)
        model.to(options.device)
        optimizer = LipschitzMuon(model, lr=0.1)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            optimizer.step()
        upper, caps = certify(model).lipschitz, certify(model, "caps").lipschitz
        lower = falsify(model, restarts=1, steps=5).lower_bound
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = certify(type(model).from_pretrained(folder)).lipschitz
        # A device rounds its sums in another order than the CPU does.
        same = abs(again / upper - 1.0) < 2e-3
        ok = lower <= upper <= caps * 1.001 and same
        found[family] = {"ok": ok, "lower": lower, "upper": upper, "caps": caps, "loaded": again}
    wrong = {family: row for family, row in found.items() if not row["ok"]}
    if wrong:
        raise RuntimeError(f"not proven: {wrong}")
    return {"families": found}


def synchronizations(options: argparse.Namespace) -> dict[str, Any]:
    """Calls by which the host waits for the device, in the fourth step of LipschitzMuon."""
    from torch.profiler import ProfilerActivity, profile

    found = {}
    for method in ("stiefel", "soft_cap", "spectral_normalize", "hard_cap"):
        model = character_gpt2(64, 64, 2, 32)
        retrofit(model, "accurate" if method == "stiefel" else None)
        model.to(options.device)
        optimizer = LipschitzMuon(model, lr=0.1)
        for group in optimizer.param_groups:
            group.update({"method": method} if "method" in group else {})

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            for p in model.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            optimizer.step()
            synchronize(options.device)

        for _ in range(3):
            step()
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if options.device == "cuda" else []
        with profile(activities=activities) as seen:
            step()
        names = ("cudaStreamSynchronize", "cudaMemcpy", "aten::_local_scalar_dense")
        events = {e.key: e.count for e in seen.key_averages()}
        found[method] = {name: events.get(name, 0) for name in names}
    return found


def certificates(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a second certificate of GPT-2 small and of 1.3 B parameters, on the device."""
    sizes = {"124M": (12, 768, 12, 50257), "1.3B": (24, 2048, 32, 50257)}
    if options.smoke:
        sizes = {"tiny": (1, 64, 1, 128)}
    found = {}
    for name, (layers, width, heads, vocabulary) in sizes.items():
        config = GPT2Config(
            n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=1024
        )
        with torch.device(options.device):
            model = GPT2LMHeadModel(config)
        retrofit(model)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            bound = certify(model).lipschitz
            synchronize(options.device)
            seconds.append(time.perf_counter() - start)
        found[name] = {"first_s": seconds[0], "again_s": seconds[1], "bound": bound}
        del model
    return found


def benchmark(name: str, *words: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """A part that runs a benchmark of this folder, whose last line of output is the row."""

    def run(options: argparse.Namespace) -> dict[str, Any]:
        chosen = ["--smoke"] if options.smoke else [w.format(text=options.text) for w in words]
        command = [sys.executable, str(ROOT / "benchmarks" / name), *chosen]
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.part)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return {"command": [name, *chosen], **json.loads(done.stdout.splitlines()[-1])}

    return run


_SMALL = ("--layers", "12", "--tokens", "8192", "--vocabulary", "50257", "--length", "1024")
_CHARACTERS = ("--task", "char", "--budget", "full", "--text", "{text}", "--only")
_DEPTH = ("--text", "{text}", "--layers", "12", "--width", "768", "--steps", "600")
PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "correctness": correctness,
    "synchronizations": synchronizations,
    "step of Muon": benchmark("muon_step.py"),
    "step through Trainer": benchmark("training_step.py", "--bf16", *_SMALL),
    "certificates": certificates,
    "whole run": benchmark("whole_run.py", "--bf16", "--steps", "60", "--rounds", "1", *_SMALL),
    "linear algebra": benchmark("linalg_speed.py"),
    "characters, gpt2": benchmark("frontier.py", *_CHARACTERS, "accurate, logits x 40, gpt2/*"),
    "characters, llama": benchmark("frontier.py", *_CHARACTERS, "accurate, logits x 40, llama/*"),
    "124M, accurate": benchmark("depth.py", *_DEPTH, "--family", "gpt2", "--run", "accurate"),
    "124M, adamw": benchmark("depth.py", *_DEPTH, "--family", "gpt2", "--run", "adamw"),
    "124M, robust": benchmark("depth.py", *_DEPTH, "--family", "gpt2", "--run", "robust"),
}
# At toy size each benchmark is run by CI anyway.
SMOKE = ("correctness", "synchronizations", "certificates", "linear algebra")


def parse() -> argparse.Namespace:
    made = parser(__doc__, text=True, device=True)
    made.add_argument("--only", nargs="+", choices=PARTS, help="some parts; all without")
    made.add_argument("--list", action="store_true", help="the parts, and which have rows")
    made.add_argument("--seconds", type=float, default=560.0, help="no part begins after this")
    made.add_argument("--part", type=float, default=240.0, help="seconds that a part may take")
    made.add_argument("--results", type=Path, default=RESULTS)
    return made.parse_args()


def main() -> None:
    options = parse()
    if options.list:
        rows = options.results.read_text().splitlines() if options.results.exists() else []
        have = {json.loads(row)["part"] for row in rows}
        print("\n".join(f"{part:<24} {'measured' if part in have else '-'}" for part in PARTS))
        return
    where, began, failed = machine(options.device), time.perf_counter(), []
    headline("what only a GPU can tell", where)
    for part in options.only or (SMOKE if options.smoke else PARTS):
        if time.perf_counter() - began > options.seconds:
            print(f"{part}: left out, no time")
            continue
        start = time.perf_counter()
        try:
            found = PARTS[part](options)
        except Exception as error:  # the other parts are worth having
            failed.append(part)
            found = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        row = {"part": part, **found, **where, "seconds": round(time.perf_counter() - start, 1)}
        text = json.dumps(row)
        print(text[:400], flush=True)
        if not options.smoke:
            with options.results.open("a") as file:
                file.write(text + "\n")
    finish("gpu", where, failed=failed)
    if failed:
        raise SystemExit(f"failed: {failed}")


if __name__ == "__main__":
    main()
