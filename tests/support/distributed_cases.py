"""What test_distributed.py runs: the same training on one process, under DDP, and under FSDP2.

On one process it runs by calling `train(case)`. On several it runs by
torchrun --nproc_per_node N distributed_cases.py OUT, and each rank writes OUT/rank-N.pt. Every
process draws the same global batch and takes its own rows of it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script, run by its path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lip_plugin import LipschitzMuon, attach_projection, certify, retrofit
from lip_plugin.distributed.gather import gathered
from lip_plugin.surgery.block_norms import block_norms
from tests.support.families import tiny
from tests.support.oracles import paper, randomize_, worst_over_cap

STEPS, BATCH, TOKENS = 20, 4, 12
# The width is 24, with 4 heads of 6 rows, so that pieces of 24 / 4 or 12 / 4 rows cut through
# heads. A vocabulary of 5 leaves the fourth process of four without a row of its table
# (2, 2, 1, 0), and 67 rows are cut unevenly.
_SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Case:
    family: str
    optimizer: str = "muon"
    vocabulary: int = 67
    accumulate: int = 1
    clip: float | None = None
    frozen: str | None = None  # parameters whose name ends so are
    bf16: bool = False  # forward and backward
    double: bool = False  # everything in float64
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


# Softmax does not see a key's bias, so that its gradient is rounding noise, which AdamW makes as
# large as any other. It differs between any two runs, on one process as well. "gpt2 position" has
# no keys, and keeps its biases.
_NO_BIASES = {"biases": "drop"}
CASES = {
    "gpt2": Case("gpt2", vocabulary=5, config=_NO_BIASES),
    "gpt2 position": Case(
        "gpt2", config={"position_bias": "learned", "attention_scale": 0, "activation": "abs"}
    ),
    "llama": Case("llama", accumulate=2, clip=0.5),
    "llama frozen": Case("llama", frozen="q_proj.weight"),
    "llama adamw": Case("llama", optimizer="adamw"),
    "gpt2 sgd hard cap": Case("gpt2", optimizer="sgd", config={"method": "hard_cap", **_NO_BIASES}),
    "gpt_neox": Case("gpt_neox", config=_NO_BIASES),
    "gpt2 matrices": Case("gpt2", config={"granularity": "matrix", "w_max": 1.3, **_NO_BIASES}),
    "gpt2 double": Case("gpt2", vocabulary=5, double=True, config=_NO_BIASES),
    "llama double": Case("llama", accumulate=2, clip=0.5, double=True),
    "llama bf16": Case("llama", bf16=True),
}

SWAPPED = ("llama double", "llama adamw")


def model_of(case: Case) -> nn.Module:
    model = tiny(case.family, vocab_size=case.vocabulary, **{**_SMALL, **case.model})
    model = model.double() if case.double else model
    randomize_(model)  # no map starts at zero, and most blocks start above their caps
    retrofit(model, paper(init="keep", **case.config))
    if case.frozen:
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and not name.endswith(case.frozen))
    return model


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "muon":
        return LipschitzMuon(model, lr=0.02, precision=None if case.double else "float32")
    params = [p for p in model.parameters() if p.requires_grad]
    cls: Any = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[case.optimizer]
    optimizer = cls(params, lr={"adamw": 0.003, "sgd": 0.5}[case.optimizer])
    attach_projection(optimizer, model)
    return optimizer


def shard(model: nn.Module, bf16: bool, copies: int = 1) -> nn.Module:
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if bf16
        else MixedPrecisionPolicy()
    )
    world = dist.get_world_size()
    names, sizes = ("copies", "shards"), (copies, world // copies)
    mesh = dist.init_device_mesh("cpu", sizes, mesh_dim_names=names)
    mesh = mesh["shards"] if copies == 1 else mesh
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def swap(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case) -> nn.Module:
    """Shard the model of an optimizer that is there already, as accelerate does.

    The shards go into its groups.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    wrapped = shard(model, case.bf16)
    now = dict(wrapped.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[names[id(p)]] for p in group["params"]]
    return wrapped


def backward(case: Case, model: nn.Module, step: int, rank: int, world: int) -> float:
    """Gradients of the mean loss over the global batch, in `accumulate` parts."""
    generator = torch.Generator().manual_seed(step)
    total = 0.0
    for part in range(case.accumulate):
        ids = torch.randint(case.vocabulary, (BATCH, TOKENS), generator=generator)
        mine = ids[rank * BATCH // world : (rank + 1) * BATCH // world]
        last = part == case.accumulate - 1
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model.require_backward_grad_sync = last
        with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
            logits = model(mine).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1),
            mine[:, 1:].flatten(),
        )
        (loss / case.accumulate).backward()
        total += float(loss.detach())
    return total / case.accumulate


def train(case: Case, how: str = "alone") -> dict[str, Any]:
    """Train a case, with the same result on every process.

    Gives the weights, the worst norms over caps after every step (float64 SVDs), and the
    certificate.
    """
    rank, world = (0, 1) if how == "alone" else (dist.get_rank(), dist.get_world_size())
    model = model_of(case)
    starts = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = model
    if how == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif how in ("fsdp", "hsdp"):
        wrapped = shard(model, case.bf16, copies=1 if how == "fsdp" else 2)
    optimizer = optimizer_of(case, wrapped)
    if how == "swapped":
        wrapped = swap(model, optimizer, case)
    worst, losses = [], []
    for step in range(STEPS):
        losses.append(backward(case, wrapped, step, rank, world))
        if case.clip:
            nn.utils.clip_grad_norm_(wrapped.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
        worst.append(worst_of(wrapped, how))
    weights = whole_weights(model)
    moved = [n for n, w in weights.items() if not torch.equal(w, starts[n])]
    return {
        "weights": weights,
        "worst": worst,
        "losses": losses,
        "moved": moved,
        "certificate": certify(wrapped).to_json(),
        "caps": certify(wrapped, "caps").to_json(),
        "proven": [(b.name, b.worst_over_cap, b.count) for b in block_norms(wrapped)],
        "sharded": [n for n, p in model.named_parameters() if isinstance(p, DTensor)],
        "pieces": {
            n: p.to_local().shape[0] for n, p in model.named_parameters() if isinstance(p, DTensor)
        },
        "momentum_sharded": all(
            isinstance(s["momentum"], DTensor) for s in optimizer.state.values() if "momentum" in s
        ),
        "world": world,
    }


def worst_of(model: nn.Module, how: str) -> float:
    if how in ("alone", "ddp"):
        return worst_over_cap(model)
    plain = gathered(model)
    return 0.0 if plain is None else worst_over_cap(plain)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in model.named_parameters()
    }


def leave() -> None:
    """End a process of several.

    When all work is done, torch's threads now and then abort, or wait for ever, at the exit of the
    interpreter (met three times with 2.13 and gloo). So there is no such exit.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names = os.environ.get("CASES", "").split(",") if os.environ.get("CASES") else list(CASES)
    results: dict[str, Any] = {
        how: {name: train(CASES[name], how) for name in names} for how in ("ddp", "fsdp")
    }
    results["swapped"] = {name: train(CASES[name], "swapped") for name in SWAPPED if name in names}
    if dist.get_world_size() == 4:  # two copies, each sharded over two
        results["hsdp"] = {name: train(CASES[name], "hsdp") for name in SWAPPED if name in names}
    results |= {"pid": os.getpid(), "rank": dist.get_rank(), "world": dist.get_world_size()}
    torch.save(results, out / f"rank-{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
