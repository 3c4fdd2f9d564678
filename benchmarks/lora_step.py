"""What holding LoRA's weights costs: time of the constraint over LoRA's own step, and memory beyond LoRA's, on GPT-2 small.

    python benchmarks/lora_step.py                          # GPT-2 small's shapes, 1024 tokens: several minutes on a CPU
    python benchmarks/lora_step.py --tokens 8192 --device cuda
    python benchmarks/lora_step.py --smoke

One model, random weights of its own initialization; LoRA on the targets, AdamW. A step is forward, backward and
optimizer; the constraint is what `attach_projection` does behind it, timed by itself in the same run. Four cases:

    budget      untouched base, constrain_adapters(budget): the change of every block clipped
    room        caps of twice the base's own norms: sizes of changes alone settle it
    at caps     caps at the base's own norms: every step leaves them, and is projected
    start       at caps, the one projection that finds the eigenvectors of the frozen base (once in a run)

Medians over the steps. Memory is what the constraint keeps between steps (norms and eigenvectors of the frozen base).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from typing import Any

import peft
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from lip_plugin import LipschitzConfig, constrain_adapters, retrofit
from lip_plugin.integrations.peft import enforce as peft_lora
from lip_plugin.integrations.peft import nearest as peft_blocks
from lip_plugin.linalg.norms import rms_to_rms_upper
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.layout import ROW
from lip_plugin.optim.enforce import step_projection_

TARGETS = {"attention": ["c_attn"], "all": ["c_attn", "c_proj", "c_fc"]}


def model_for(case: str, targets: str, r: int, args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 97} if args.smoke else {}
    base = GPT2LMHeadModel(GPT2Config(**size, attn_implementation="sdpa"))
    if case != "budget":
        retrofit(base, LipschitzConfig(norms="keep", w_max=1e6))
        slack = 2.0 if case == "room" else 1.0 + 1e-3
        own = {}
        for name, m in constrained_modules(base):
            if m.layout.norm != ROW:
                own[name] = slack * max(
                    float(rms_to_rms_upper(v).max()) for _, v in m.layout.views(m.weight.detach())
                )
        from lip_plugin import set_caps_

        set_caps_(base, None, overrides=own)
    config = peft.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=TARGETS[targets], fan_in_fan_out=True
    )
    model = peft.get_peft_model(base.to(args.device), config)
    if case == "budget":
        constrain_adapters(model, 0.05, relative=True)
    return model


def measure(case: str, targets: str, r: int, args: argparse.Namespace) -> dict[str, Any]:
    model = model_for(case, targets, r, args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(
        0,
        model.config.vocab_size,
        (max(1, args.tokens // 512), min(512, args.tokens)),
        device=args.device,
    )
    began = time.perf_counter()
    project_before(model)
    first = time.perf_counter() - began
    steps, constraints = [], []
    for step in range(args.steps + 2):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sync(args.device)
        middle = time.perf_counter()
        step_projection_(model, None, lr=1e-3)
        sync(args.device)
        if step >= 2:  # the first finds what is kept
            steps.append(middle - began)
            constraints.append(time.perf_counter() - middle)
        else:
            first = max(first, time.perf_counter() - middle)
    own = (
        sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) * 4
    )  # weight, gradient, moments
    return {
        "case": case,
        "targets": targets,
        "r": r,
        "step_s": statistics.median(steps),
        "constraint_s": statistics.median(constraints),
        "ratio": statistics.median(constraints) / statistics.median(steps),
        "start_s": first,
        "kept_mib": kept(model) / 2**20,
        "lora_mib": own / 2**20,
    }


def project_before(model: Any) -> None:
    """As attach_projection does when it is called."""
    from lip_plugin.optim.enforce import keep_within_caps_

    keep_within_caps_(model)


def sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def kept(model: Any) -> int:
    """Bytes that the constraint keeps for this model's layers."""
    total = 0
    for layer in model.modules():
        for norm in peft_lora._NORMS.get(layer, ((), []))[1]:
            total += norm.numel() * norm.element_size()
        for spectrum in peft_blocks._CACHE.get(layer, ((), []))[1]:
            total += sum(
                t.numel() * t.element_size()
                for t in (spectrum.basis, spectrum.energy, spectrum.ceiling)
            )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 64])
    parser.add_argument("--targets", nargs="*", default=["attention", "all"], choices=[*TARGETS])
    parser.add_argument("--cases", nargs="*", default=["budget", "room", "at caps"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="seconds, a tiny model")
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.steps, args.ranks, args.targets = 64, 2, [4], ["all"]
    heads = ("case", "targets", "r", "LoRA step", "constraint", "ratio", "start", "kept", "LoRA")
    print("{:<9} {:<10} {:>3} {:>10} {:>11} {:>7} {:>8} {:>10} {:>10}".format(*heads))
    rows = []
    for targets in args.targets:
        for r in args.ranks:
            for case in args.cases:
                row = measure(case, targets, r, args)
                rows.append(row)
                print(
                    f"{case:<9} {targets:<10} {r:>3} {row['step_s']:>9.3f}s {1e3 * row['constraint_s']:>9.1f}ms "
                    f"{row['ratio']:>7.3f} {row['start_s']:>7.2f}s {row['kept_mib']:>6.1f} MiB {row['lora_mib']:>6.1f} MiB",
                    flush=True,
                )
    record = {
        "rows": rows,
        "tokens": args.tokens,
        "device": args.device,
        "threads": torch.get_num_threads(),
    }
    record |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    record |= {
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "smoke": args.smoke,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
