"""Adapters on two processes, which ddp_script.py runs beside whole models.

Each rank has batches of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lip_plugin import LipschitzCallback, LipschitzMuon, attach_projection, constrain_adapters
from tests.support.families import tiny
from tests.support.peft_models import base_of, disturb, trainable, tuner, worst_change, worst_merged

STEPS = 10
KINDS = ("lora caps", "lora muon", "lora budget", "dora caps", "dora budget")


def by_hand(kind: str) -> dict[str, Any]:
    """A bare DDP loop over adapters at caps of 1, or with a budget on an untouched base."""
    name, held = kind.split()
    rank = dist.get_rank()
    torch.manual_seed(0)
    base = tiny("llama", num_hidden_layers=1) if held == "budget" else base_of("llama")
    torch.manual_seed(100 + rank)  # DDP has to make the starts equal, not luck
    model: Any = get_peft_model(base, tuner(name, "llama"))
    disturb(model, 0.3, seed=rank)
    if held == "budget":
        constrain_adapters(model, 0.1, relative=True)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if held == "muon":
        optimizer: torch.optim.Optimizer = LipschitzMuon(wrapped, lr=0.1)
    else:
        optimizer = torch.optim.AdamW(trainable(wrapped), lr=0.05)
        attach_projection(optimizer, wrapped)
    worst = []
    for step in range(STEPS):
        ids = torch.randint(67, (2, 12), generator=torch.Generator().manual_seed(2 * step + rank))
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        worst.append(worst_change(model) if held == "budget" else worst_merged(model))
    return {"weights": {n: p.detach().clone() for n, p in model.named_parameters()}, "worst": worst}


class _AfterEveryStep(TrainerCallback):
    def __init__(self, measure: Any) -> None:
        self.measure = measure
        self.worst: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.worst.append(self.measure(kwargs["model"]))


def with_trainer(folder: Path, capped: bool) -> dict[str, Any]:
    """LoRA on a capped base, or on an untouched one, in a Trainer with the lone callback."""
    torch.manual_seed(0)
    base = base_of("llama") if capped else tiny("llama", num_hidden_layers=1)
    torch.manual_seed(100 + dist.get_rank())
    model: Any = get_peft_model(base, tuner("lora", "llama"))
    disturb(model, 0.3, seed=dist.get_rank())
    texts = [[(start + t) % 7 for t in range(16)] for start in range(64)]
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        logging_steps=5,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    each = _AfterEveryStep(worst_merged if capped else worst_change)
    data: Any = [{"input_ids": ids, "labels": ids} for ids in texts]
    trainer = Trainer(model, args, train_dataset=data, callbacks=[LipschitzCallback(), each])
    trainer.train()
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "worst": each.worst,
    }
