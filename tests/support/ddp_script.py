"""What each of two processes runs in test_ddp.py: a Trainer with a lone callback, and a DDP loop.

It is no test by itself. It runs by torchrun --nproc_per_node 2 ddp_script.py OUT, and each rank
writes OUT/rank-N.pt.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script, run by its path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lip_plugin import LipschitzCallback, LipschitzMuon, attach_projection, certify, retrofit
from lip_plugin.distributed.owners import is_sharded
from lip_plugin.integrations.huggingface import metrics as hf_measure
from lip_plugin.surgery.block_norms import block_norms
from tests.support import peft_ddp_cases
from tests.support.distributed_cases import leave
from tests.support.families import tiny
from tests.support.oracles import loss_of, paper, worst_over_cap

torch.set_num_threads(1)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1}
STEPS = 10


class AfterEveryStep(TrainerCallback):
    def __init__(self) -> None:
        self.worst: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.worst.append(worst_over_cap(kwargs["model"]))


class Counter(logging.Handler):
    """Counts what lip_plugin logs on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def with_trainer(family: str, folder: Path) -> dict:
    texts = [[(start + t) % 7 for t in range(16)] for start in range(64)]
    data = [{"input_ids": ids, "labels": ids} for ids in texts]
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        logging_steps=5,
        save_steps=5,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    each = AfterEveryStep()
    torch.manual_seed(int(os.environ["RANK"]))  # DDP has to make the starts equal, not luck
    model = tiny(family, **SMALL)
    trainer = Trainer(
        model, args, train_dataset=data, callbacks=[LipschitzCallback(certify_share=1), each]
    )
    trainer.train()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        "weights": weights(model),
        "worst": each.worst,
        "optimizer": type(inner).__name__,
        "world_size": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "logged": sum("lip/log10_certificate" in e for e in trainer.state.log_history),
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
    }


def sharded(folder: Path) -> dict:
    """A saved retrofitted model in a Trainer with a lone callback.

    transformers loads it sharded (FSDP2).
    """
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        base = tiny("llama", **SMALL)
        retrofit(base, paper())
        base.save_pretrained(folder / "base")
    dist.barrier()
    spread = DistributedConfig(fsdp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=spread)
    texts = [[(start + t) % 7 for t in range(16)] for start in range(64)]
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=STEPS,
        logging_steps=5,
        save_steps=5,
        save_only_model=True,  # transformers cannot save the optimizer of a model that it sharded
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts],
        callbacks=[LipschitzCallback(certify_share=1)],
    )
    trainer.train()
    certificate = certify(trainer.model)
    trainer.save_model(str(folder / "final"))
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        "sharded": sum(is_sharded(p) for p in model.parameters()),
        "parameters": sum(1 for _ in model.parameters()),
        "optimizer": type(inner).__name__,
        "worst": max(b.worst_over_cap for b in block_norms(trainer.model)),
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "logged": sum("lip/log10_certificate" in e for e in trainer.state.log_history),
        "certificate": certificate.to_json(),
    }


def by_hand(kind: str) -> dict:
    """A bare loop under DDP with LipschitzMuon, or with AdamW and a projection."""
    rank = dist.get_rank()
    model = tiny("llama", **SMALL)
    torch.manual_seed(100 + rank)
    retrofit(model, paper())
    wrapped = nn.parallel.DistributedDataParallel(model)
    if kind == "muon":
        optimizer = LipschitzMuon(wrapped, lr=0.1)
    else:
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.05)
        attach_projection(optimizer, wrapped)
    worst = []
    for step in range(STEPS):
        ids = torch.randint(67, (2, 12), generator=torch.Generator().manual_seed(2 * step + rank))
        logits = wrapped(ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        worst.append(worst_over_cap(model))
    return {"weights": weights(model), "worst": worst, "loss": float(loss_of(model, ids).detach())}


def main(out: Path) -> None:
    counter, written, write = Counter(), [], hf_measure.write_certificate

    def write_and_tell(model: nn.Module, folder: Path, latest: Any = None) -> None:
        if dist.get_rank() == 0:
            written.append(str(folder))
        write(model, folder, latest)

    hf_measure.write_certificate = write_and_tell
    logger = logging.getLogger("lip_plugin")
    logger.setLevel(logging.INFO)
    logger.addHandler(counter)
    results = {family: with_trainer(family, out / family) for family in ("gpt2", "llama")}
    results |= {kind: by_hand(kind) for kind in ("muon", "adamw")}
    results |= {kind: peft_ddp_cases.by_hand(kind) for kind in peft_ddp_cases.KINDS}
    for name, capped in (("trainer caps", True), ("trainer budget", False)):
        results[name] = peft_ddp_cases.with_trainer(out / name, capped)
    results["sharded"] = sharded(out / "sharded")
    results |= {"pid": os.getpid(), "rank": dist.get_rank(), "world_size": dist.get_world_size()}
    results |= {"backend": dist.get_backend(), "lines": counter.lines, "written": written}
    torch.save(results, out / f"rank-{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
