"""What each of two processes runs in test_schedule_ddp.py: a Trainer under a RetrofitSchedule.

It is no test by itself. It runs by torchrun --nproc_per_node 2 schedule_ddp_script.py OUT, and each
rank writes OUT/rank-N.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script, run by its path

import torch
from transformers import Trainer, TrainingArguments

from lip_plugin import LipschitzCallback, RetrofitSchedule, config_of
from lip_plugin.surgery.block_norms import block_norms
from tests.support.distributed_cases import leave
from tests.support.families import data_for, tiny
from tests.support.oracles import paper

torch.set_num_threads(1)


def main(out: Path) -> None:
    rank = int(os.environ["RANK"])
    model = tiny("llama")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    # each process has batches of its own: the constants must be one process's all the same
    batches = [torch.randint(67, (4, 12), generator=torch.Generator().manual_seed(rank))]
    config = paper(norms="calibrated", w_max=0.4, embedding_max=0.4)
    callback = LipschitzCallback(config, schedule=RetrofitSchedule(every=2), calibration=batches)
    args = TrainingArguments(
        str(out / "run"),
        max_steps=8,
        per_device_train_batch_size=4,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=data_for("llama"), callbacks=[callback])
    at_start = config_of(model).norm_floors
    trainer.train()
    config = config_of(model)
    found = {
        "at_start": at_start,
        "end": (config.w_max, config.overrides),
        "floors": config.norm_floors,
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "worst": max(b.worst_over_cap for b in block_norms(model)),
        "steep": [
            e["lip/steepest_norm"] for e in trainer.state.log_history if "lip/steepest_norm" in e
        ],
        "world_size": args.world_size,
    }
    torch.save(found, out / f"rank-{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
