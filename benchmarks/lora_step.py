"""What does holding LoRA's weights cost, over LoRA's own step in time and memory, on GPT-2 small?

    python benchmarks/lora_step.py                          # 1024 tokens: minutes on a CPU
    python benchmarks/lora_step.py --tokens 8192 --device cuda
    python benchmarks/lora_step.py --smoke

One model has random weights of its own initialization, LoRA on the targets, and AdamW. A step is
forward pass, backward pass and optimizer. The constraint is what `attach_projection` does behind
it, timed by itself in the same run. There are three cases:

    budget      untouched base, constrain_adapters(budget): the change of every block clipped
    room        caps of twice the base's own norms: sizes of changes alone settle it
    at caps     caps at the base's own norms: every step leaves them, and is projected

`start` is the one projection that finds the eigenvectors of the frozen base, once in a run. Times
are medians over the steps. Memory is what the constraint keeps between steps, which are norms and
eigenvectors of the frozen base, beside the weights, gradients and moments of LoRA.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import peft
import torch
from common import MIB, Table, finish, headline, machine, parsed, parser, timed
from transformers import GPT2Config, GPT2LMHeadModel

from lip_plugin import LipschitzConfig, constrain_adapters, retrofit, set_caps_
from lip_plugin.integrations.peft import enforce as peft_lora
from lip_plugin.integrations.peft import nearest as peft_blocks
from lip_plugin.linalg.norms import rms_to_rms_upper
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.layout import ROW
from lip_plugin.optim.enforce import keep_within_caps_, step_projection_

TARGETS = {"attention": ["c_attn"], "all": ["c_attn", "c_proj", "c_fc"]}


def model_for(case: str, targets: str, r: int, args: argparse.Namespace) -> Any:
    """A GPT-2 with LoRA, under the constraint of a case."""
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
        set_caps_(base, None, overrides=own)
    config = peft.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=TARGETS[targets], fan_in_fan_out=True
    )
    model = peft.get_peft_model(base.to(args.device), config)
    if case == "budget":
        constrain_adapters(model, 0.05, relative=True)
    return model


def measure(case: str, targets: str, r: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    model = model_for(case, targets, r, args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(
        0,
        model.config.vocab_size,
        (max(1, args.tokens // 512), min(512, args.tokens)),
        device=args.device,
    )

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def constrain() -> None:
        step_projection_(model, None, lr=1e-3)

    # Two rounds find what is kept, after what attach_projection does when it is called.
    start = timed(lambda: keep_within_caps_(model), args.device).wall
    rounds = [
        (timed(step, args.device).wall, timed(constrain, args.device).wall)
        for _ in range(args.steps + 2)
    ]
    step_s, constraint_s = (statistics.median(times[2:]) for times in zip(*rounds, strict=True))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {
        "case": case,
        "targets": targets,
        "r": r,
        "step_s": step_s,
        "constraint_s": constraint_s,
        "ratio": constraint_s / step_s,
        "start_s": max(start, *(times[1] for times in rounds[:2])),
        "kept_mib": kept(model) / MIB,
        "lora_mib": 4 * trained / MIB,  # weight, gradient, two moments
    }


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
    made = parser(__doc__, tokens=(1024, "of a step"), steps=(5, "steps that count"))
    made.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 64])
    made.add_argument("--targets", nargs="*", default=["attention", "all"], choices=[*TARGETS])
    made.add_argument("--cases", nargs="*", default=["budget", "room", "at caps"])
    made.add_argument("--device", default="cpu")
    args = parsed(made, tokens=64, steps=2, ranks=[4], targets=["all"])
    where = machine(args.device, "peft")
    headline("the constraint behind a step of LoRA", where)
    table = Table(
        *(("case", "<8"), ("targets", "<9"), ("r", "3"), ("LoRA step s", "8.3f")),
        *(("constraint ms", "8.1f"), ("ratio", "6.3f"), ("start s", "7.2f")),
        *(("kept MiB", "7.1f"), ("LoRA MiB", "7.1f")),
    )
    rows = []
    for targets in args.targets:
        for r in args.ranks:
            for case in args.cases:
                row = measure(case, targets, r, args)
                rows.append(row)
                table.row(*{**row, "constraint_s": 1e3 * row["constraint_s"]}.values())
    finish("lora_step", where, rows=rows, tokens=args.tokens, smoke=args.smoke)


if __name__ == "__main__":
    main()
