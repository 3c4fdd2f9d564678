"""What each of two processes runs in test_bad_moments.py.

torchrun --nproc_per_node 2 bad_moments_script.py OUT
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script, run by its path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lip_plugin import (
    certify,
    falsify,
    forward_rounding_upper,
    load_checkpoint,
    plan_caps,
    project_,
    release,
    retrofit,
    save_checkpoint,
    set_caps_,
)
from lip_plugin.distributed.gather import gathered
from lip_plugin.distributed.owners import local, on_first
from lip_plugin.optim import muon
from lip_plugin.surgery.block_norms import block_norms
from tests.support.distributed_cases import (
    CASES,
    backward,
    leave,
    model_of,
    optimizer_of,
    shard,
    whole_weights,
)
from tests.support.families import tiny
from tests.support.oracles import worst_over_cap

CASE = CASES["llama"]


def setup(how: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = model_of(CASE)
    wrapped = shard(model, False) if how == "fsdp" else nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(CASE, wrapped)
    step(wrapped, optimizer)
    return wrapped, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    backward(CASE, model, 0, dist.get_rank(), dist.get_world_size())
    optimizer.step()
    optimizer.zero_grad()


def parameter(model: nn.Module, ending: str) -> Any:
    return next(p for n, p in model.named_parameters() if n.endswith(ending))


def moment(how: str, what: Callable[[nn.Module, torch.optim.Optimizer], None]) -> dict[str, Any]:
    """What `what` raises, whether the weights are as before, and whether training goes on."""
    model, optimizer = setup(how)
    backward(CASE, model, 1, dist.get_rank(), dist.get_world_size())
    before = whole_weights(model)
    found: dict[str, Any] = {"kind": None, "text": ""}
    try:
        what(model, optimizer)
    except Exception as error:
        kinds = [c.__name__ for c in type(error).__mro__]
        found = {"kind": "OSError" if "OSError" in kinds else kinds[0], "text": str(error)}
    after = whole_weights(model)
    if not any(w.isnan().any() for w in after.values()):
        found["worst"] = max(b.worst_over_cap for b in block_norms(model))
    found["unchanged"] = all(torch.equal(before[n], w) or w.isnan().any() for n, w in after.items())
    optimizer.zero_grad()
    for p in model.parameters():  # mend what was broken on purpose
        local(p.data).nan_to_num_(nan=0.1)
    step(model, optimizer)
    found["goes on"] = True
    return found


def nan_in_one_shard(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if dist.get_rank() == 1:
        local(parameter(model, "layers.0.mlp.up_proj.weight").grad)[-1, -1] = float("nan")
    optimizer.step()


def inf_in_ddp(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if dist.get_rank() == 0:
        parameter(model, "layers.0.mlp.up_proj.weight").grad[0, 0] = float("inf")
    optimizer.step()


def gradient_on_one_only(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if dist.get_rank() == 0:
        parameter(model, "layers.0.self_attn.q_proj.weight").grad = None
    optimizer.step()


def one_fails_at_its_share(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    whole = muon.orthogonalize
    if dist.get_rank() == 1:

        def fails(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of memory, say")

        muon.orthogonalize = fails  # type: ignore[assignment]
    try:
        optimizer.step()
    finally:
        muon.orthogonalize = whole


def weights_that_are_nan(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if dist.get_rank() == 0:
        local(parameter(model, "layers.1.mlp.down_proj.weight").data)[0, 0] = float("nan")
    project_(model)


def certificate_of_nan(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    local(parameter(model, "layers.1.mlp.down_proj.weight").data)[0, 0] = float("nan")
    certify(model)


def full_disk(folder: Path) -> Callable[[nn.Module, torch.optim.Optimizer], None]:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            save_checkpoint(folder, 1, model, optimizer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return save


def calls_on_shards() -> dict[str, Any]:
    """The answers of what else takes a sharded model, the same on all processes."""
    model, optimizer = setup("fsdp")
    bound = certify(model)
    bound.verify(model)
    found: dict[str, Any] = {
        "certified": bound.lipschitz,
        "attained": falsify(model, restarts=1, steps=2).lower_bound,
        "caps": certify(model, "caps").lipschitz,
        "planned": plan_caps(model, 2.0).w_max,
        "rounding": forward_rounding_upper(model, torch.float32, 8),
    }
    changed = set_caps_(model, optimizer, w_max=0.5)
    found["changed"] = len(changed)
    found["worst after"] = max(b.worst_over_cap for b in block_norms(model))
    found["caps after"] = certify(model, "caps").lipschitz
    step(model, optimizer)
    found["worst after a step"] = max(b.worst_over_cap for b in block_norms(model))
    return found


def forward_only(model: nn.Module) -> None:
    """A forward pass as an evaluation makes it.

    FSDP2 leaves some parameters gathered after it.
    """
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))


def after_an_evaluation() -> dict[str, float]:
    """The worst stored norm over its cap, after an evaluation and then each of these.

    It is by a float64 SVD of a copy.
    """
    found = {}
    for kind in ("muon", "adamw"):
        model = model_of(CASE)
        fully_shard(model)
        optimizer = optimizer_of(replace(CASE, optimizer=kind), model)
        backward(CASE, model, 0, dist.get_rank(), dist.get_world_size())
        forward_only(model)
        optimizer.step()
        found[f"{kind} step"] = worst_stored(model)
        forward_only(model)
        set_caps_(model, optimizer, w_max=0.5)
        found[f"{kind} recap"] = worst_stored(model)
    model = shard(model_of(CASE), False)
    forward_only(model)
    project_(model)
    found["project"] = worst_stored(model)
    return found


def worst_stored(model: nn.Module) -> float:
    """Whatever is gathered now, the stored shards count."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    plain = gathered(model)
    worst = torch.tensor(0.0 if plain is None else worst_over_cap(plain), dtype=torch.float64)
    dist.broadcast(worst, 0)
    return float(worst)


def certified_after_an_evaluation() -> bool:
    """Whether a certificate is of the stored weights after an evaluation.

    The evaluation may leave copies of older ones.
    """
    model, optimizer = setup("fsdp")
    backward(CASE, model, 1, dist.get_rank(), dist.get_world_size())
    forward_only(model)
    optimizer.step()
    stated = certify(model)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return stated == certify(model)


def several_models(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A model for each process, over a mesh of its own.

    One certificate cannot be for both.
    """
    mesh = dist.init_device_mesh(
        "cpu", (dist.get_world_size(), 1), mesh_dim_names=("copies", "shards")
    )
    own = model_of(CASE)
    fully_shard(own, mesh=mesh["shards"])
    certify(own)


def cannot_be_copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inner = next(m for m in model.modules() if hasattr(m, "lm_head"))
    inner.lock = threading.Lock()  # type: ignore[assignment]
    try:
        certify(model)
    finally:
        del inner.lock


def nan_of_one_replica(folder: Path) -> Callable[[nn.Module, torch.optim.Optimizer], None]:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if dist.get_rank() == 0:
            parameter(model, "layers.1.mlp.down_proj.weight").data[0, 0] = float("nan")
        save_checkpoint(folder, 1, model, optimizer)

    return save


def does_not_pickle(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    on_first(lambda: lambda: None)


def resumed(folder: Path) -> dict[str, Any]:
    """The first process's extra, and work that is still shared out, after a load."""
    model, optimizer = setup("ddp")
    save_checkpoint(
        folder, 1, model, optimizer, {f"key {i}": float(dist.get_rank()) for i in range(10)}
    )
    model, optimizer = setup("ddp")
    extra: dict[str, Any] = {f"key {i}": None for i in range(10)}
    load_checkpoint(folder, model, optimizer, extra)
    return {"extra": sorted(set(extra.values())), "shared": optimizer.process_group is not None}  # type: ignore[attr-defined]


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {
        "nan in one shard": moment("fsdp", nan_in_one_shard),
        "inf in ddp": moment("ddp", inf_in_ddp),
        "gradient on one process only": moment("ddp", gradient_on_one_only),
        "one process fails at its share": moment("fsdp", one_fails_at_its_share),
        "weights that are nan": moment("fsdp", weights_that_are_nan),
        "retrofit of a sharded model": moment(
            "fsdp", lambda m, o: retrofit(shard(tiny("llama"), False)) and None
        ),
        "release of a sharded model": moment("fsdp", lambda m, o: release(m) and None),
        "certificate of nan": moment("fsdp", certificate_of_nan),
        "a full disk on the first process": moment("fsdp", full_disk(out / "run")),
    }
    results |= {
        "several models": moment("fsdp", several_models),
        "a model that cannot be copied": moment("fsdp", cannot_be_copied),
        "nan of one replica at a save": moment("ddp", nan_of_one_replica(out / "nan")),
        "a result that does not pickle": moment("ddp", does_not_pickle),
    }
    results["calls on shards"] = calls_on_shards()
    results["after an evaluation"] = after_an_evaluation()
    results["certified after an evaluation"] = certified_after_an_evaluation()
    results["resumed"] = resumed(out / "resumed")
    (out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
