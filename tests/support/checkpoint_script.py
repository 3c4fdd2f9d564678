"""A loop that saves after every step and goes on where it was, to be killed at any moment.

    python checkpoint_script.py RUN STEPS CASE [alone|fsdp|ddp]      (or under torchrun)

Prints a line for each step; writes RUN/final.pt when it is through.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script, run by its path

import torch
import torch.distributed as dist
from torch import nn

from lip_plugin.training.checkpoint import load_checkpoint, save_checkpoint
from tests.support.distributed_cases import (
    CASES,
    backward,
    leave,
    model_of,
    optimizer_of,
    shard,
    whole_weights,
)


def main(run: Path, steps: int, name: str, how: str) -> None:
    torch.set_num_threads(1)
    if how == "alone":
        work(run, steps, name, how, 0, 1)
        return
    dist.init_process_group("gloo")
    work(run, steps, name, how, dist.get_rank(), dist.get_world_size())
    leave()


def work(run: Path, steps: int, name: str, how: str, rank: int, world: int) -> None:
    case = CASES[name]
    model = model_of(case)
    wrapped: nn.Module = model
    if how == "fsdp":
        wrapped = shard(model, case.bf16)
    elif how == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(case, wrapped)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 40)
    extra = {"scheduler": scheduler.state_dict(), "noise": torch.zeros(3)}
    start = load_checkpoint(run, wrapped, optimizer, extra) or 0
    if start:
        scheduler.load_state_dict(extra["scheduler"])
        assert torch.equal(extra["noise"], torch.full((3,), float(start)))
    print(f"from {start}", flush=True)
    for step in range(start, steps):
        backward(case, wrapped, step, rank, world)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        extra = {"scheduler": scheduler.state_dict(), "noise": torch.full((3,), float(step + 1))}
        save_checkpoint(run, step + 1, wrapped, optimizer, extra)
        if rank == 0:
            print(f"step {step + 1}", flush=True)
    weights = whole_weights(model)
    if rank == 0:
        torch.save(weights, run / "final.pt")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3],
        sys.argv[4] if len(sys.argv) > 4 else "alone",
    )
