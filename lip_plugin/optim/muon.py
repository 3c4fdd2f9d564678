"""LipschitzMuon: steps of known norm, and a projection that keeps every block within its cap.

A matrix block moves by lr * sqrt(d_out/d_in) * (its momentum, orthogonalized), which is at most lr
in the RMS->RMS norm. A block that was within its cap is therefore within cap + lr after the move.
The projection knows this bound without measuring anything, which makes the constraint cheap.

Source: arXiv 2507.13338, sections 3 and 4. Muon is by Keller Jordan,
kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.distributed.owners import on_owners, replicas_of
from lip_plugin.errors import ConfigError
from lip_plugin.face import require_module
from lip_plugin.linalg.polar import orthogonalize
from lip_plugin.linalg.projections import project
from lip_plugin.model.batches import Batch, batches, cost_of, gathered_lerp
from lip_plugin.model.layout import Layout
from lip_plugin.optim.adamw import step_adamw_
from lip_plugin.optim.enforce import attach_projection, keep_within_caps_, normalize_above_
from lip_plugin.optim.groups import KINDS, param_groups, refuse_other_groups
from lip_plugin.optim.guard import Guard
from lip_plugin.optim.intact import Held
from lip_plugin.optim.lora import KIND as FACTORS
from lip_plugin.optim.lora import step_factors_
from lip_plugin.optim.precision import PRECISIONS, update_precision
from lip_plugin.optim.rows import momentum_, step_rows_
from lip_plugin.surgery.state import constraints_of

# How far above 1 rounding may leave sigma_max of a block that was orthogonalized in bf16, as
# tests/linalg/test_polar.py finds.
_ORTHOGONAL_SLACK = 2e-3
# That slack, and the rounding of a float32 projection, are tested and not proven. So a proven bound
# is computed for all blocks every this many steps, and errors cannot add up.
_MEASURE_EVERY = 100
# Keys of a group that belong to the present model, and are not loaded from a saved state.
_OWN = ("layouts", "pairs", "kind", "method", "param_names")


class LipschitzMuon(torch.optim.Optimizer):
    """Muon with a projection for constrained matrices, row steps for tables, AdamW for the rest.

    Schedulers act on each group's `lr`; the rate of a group is lr * lr_ratio. Frozen matrices are
    brought within their caps when the optimizer is built from a model. Call `project_(model)` after
    you write to one later.

    Args:
        params: a retrofitted model, or groups made by `lip_plugin.optim.groups.param_groups`.
        lr: rate of the matrices, in RMS->RMS norm per step. A good value carries over between
            widths.
        embedding_lr: rate of embedding rows, in RMS norm per step; None takes `lr`.
        adapter_lr: rate of peft's LoRA factors, in RMS->RMS norm per step of W0 + s B A (see
            lip_plugin/optim/lora.py); None takes `lr`. The factors have no weight decay.
        adamw_lr: rate of everything else (biases, kept norms, DoRA's magnitudes, OFT, HRA). Only
            tables of position biases have a rate of lr / 2.
        momentum: momentum of matrices and rows. Nesterov is always on.
        weight_decay: decoupled decay of matrices and rows: W <- (1 - lr * weight_decay) W - update.
        betas, eps, adamw_weight_decay: settings of the AdamW inside.
        steps: steps of the orthogonalization. With 5, an update has singular values in [0.75, 1].
        precision: dtype of the orthogonalization, `"float32"` or `"bfloat16"`. None takes bfloat16
            where it is faster: on CUDA, and for blocks from 256 wide on a CPU with bf16
            instructions. The projection is computed in float32 either way.
        process_group: its members hold equal copies of parameters and gradients (DDP). Each matrix
            is then stepped by one of them and handed to the others. None takes the group of the
            DistributedDataParallel that `params` is; without one every process steps for itself.
            Sharded parameters (FSDP2) are always shared out, over the group of their shards.

    Raises:
        ConfigError: a rate is not positive, or a group has no `kind`.
        NotRetrofittedError: `retrofit` was not applied to the model.
        NonFiniteError: at a step, a gradient on any process holds nan or inf. Nothing was changed.
        DistributedError: at a step, processes disagree on which parameters have gradients.
    """

    def __init__(
        self,
        params: nn.Module | list[dict[str, Any]],
        lr: float = 0.05,
        *,
        embedding_lr: float | None = None,
        adamw_lr: float = 3e-3,
        adapter_lr: float | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        steps: int = 5,
        precision: str | None = None,
        process_group: Any = None,
    ) -> None:
        rates = {
            "lr": lr,
            "embedding_lr": embedding_lr,
            "adamw_lr": adamw_lr,
            "adapter_lr": adapter_lr,
        }
        for name, rate in rates.items():
            number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
            if rate is not None and not (number and 0 < rate < float("inf")):
                raise ConfigError(
                    f"LipschitzMuon({name}={rate!r}): a rate must be a finite number above 0."
                )
        if not 0 <= momentum < 1 or not 0 <= weight_decay < float("inf"):
            raise ConfigError(
                "LipschitzMuon: momentum must lie in [0, 1) and weight_decay must not be negative."
            )
        if precision is not None and precision not in PRECISIONS:
            raise ConfigError(
                f"LipschitzMuon(precision={precision!r}): choose None or one of {list(PRECISIONS)}."
            )
        # Lists and the like get a message about groups below.
        if not isinstance(params, (list, tuple, dict, Iterator)):
            require_module(params, "LipschitzMuon")
        model = params if isinstance(params, nn.Module) else None
        held = None if model is None else Held(constraints_of(model)[0])
        groups = (
            params
            if model is None
            else param_groups(model, lr, embedding_lr or lr, adamw_lr, adapter_lr)
        )
        for group in groups:  # type: ignore[union-attr]
            if not isinstance(group, dict) or group.get("kind") not in KINDS:
                raise ConfigError(
                    "LipschitzMuon takes a retrofitted model, or the groups that "
                    "lip_plugin.optim.groups.param_groups(model, ...) makes: dictionaries with a "
                    f"kind in {KINDS} and layouts."
                )
            if group["kind"] in ("matrix", "row") and len(group.get("layouts", ())) != len(
                list(group["params"])
            ):
                raise ConfigError(
                    f"LipschitzMuon: a group of kind {group['kind']!r} needs one layout for each "
                    "of its params, as lip_plugin.optim.groups.param_groups(model, ...) makes them."
                )
        factor_groups = [g for g in groups if g["kind"] == FACTORS]  # type: ignore[union-attr]
        if model is None and factor_groups:
            raise ConfigError(
                "LipschitzMuon: the factors of adapters are held by a projection of the whole "
                "model. Pass the model: LipschitzMuon(model, ...)."
            )
        defaults = {
            "lr": lr,
            "lr_ratio": 1.0,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "adamw_weight_decay": adamw_weight_decay,
            "method": "soft_cap",
            "steps": steps,
            "precision": precision,
        }
        super().__init__(groups, defaults)  # type: ignore[arg-type]
        self._reset()
        if held is not None:
            held.check(self.param_groups, type(self).__name__)
        self._held, self._copied = held, False
        self.process_group = process_group
        if model is not None:
            self.process_group = process_group if process_group is not None else replicas_of(model)
            keep_within_caps_(model, self.process_group, only_frozen=True)  # no step projects those
        if model is not None and any(hasattr(m, "lora_A") for m in model.modules()):
            attach_projection(self, model)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
        # A pickle has no process_group and no _held. load_state_dict comes here too, and keeps the
        # run's own.
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("_held", None)
        self.__dict__.setdefault("_copied", False)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle does not know the model, and has no hook for its adapters.
        return {**super().__getstate__(), "_copied": self._held is not None}

    def watch(self, model: nn.Module) -> None:
        """Know the model again: for a copy of an optimizer, or one that was unpickled.

        Raises what building a LipschitzMuon from the model would raise.
        """
        require_module(model, "LipschitzMuon.watch")
        held = Held(constraints_of(model)[0])
        held.check(self.param_groups, type(self).__name__)
        self._held, self._copied = held, False
        keep_within_caps_(model, self.process_group)
        if any(hasattr(m, "lora_A") for m in model.modules()):
            attach_projection(self, model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the momenta, rates and step counts of a saved state.

        Caps, kinds and methods stay this optimizer's own, because they belong to the present model.
        The saved ones may have been made for other caps.

        Raises:
            CheckpointError: the saved groups have other kinds or sizes. Nothing was changed.
        """
        refuse_other_groups(state_dict["param_groups"], self.param_groups)
        own = [{k: g[k] for k in _OWN if k in g} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept)
        # Momenta of bf16 weights are float32, but torch has cast them to the weights' dtype.
        saved = [i for g in state_dict["param_groups"] for i in g["params"]]
        for i, p in zip(saved, (p for g in self.param_groups for p in g["params"]), strict=True):
            momentum = state_dict["state"].get(i, {}).get("momentum")
            if momentum is not None and momentum.dtype != p.dtype:
                wide = torch.promote_types(p.dtype, torch.float32)
                self.state[p]["momentum"] = momentum.detach().to(
                    device=p.device, dtype=wide, copy=True
                )

    def _reset(self) -> None:
        self._watch = Guard()
        self.seconds_projecting = 0.0
        self._steps_taken = 0  # decides when all blocks are measured, and nothing else

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step. Returns the closure's loss if a closure was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_rates()
        if self._copied:
            raise ConfigError(
                "This LipschitzMuon is a copy, or was unpickled, and does not know its model. Call "
                "optimizer.watch(model), or build a new one and load the state_dict."
            )
        if self._held is not None:
            self._held.check(self.param_groups, type(self).__name__)
        self._steps_taken += 1
        written = self._watch.inspect(self.param_groups, self.process_group)
        for group in self.param_groups:
            if group["kind"] == "matrix":
                self._step_matrices(group, written)
            else:
                step = {
                    "row": self._step_rows,
                    "adamw": self._step_adamw,
                    FACTORS: self._step_factors,
                }
                step[group["kind"]](group)
        return loss

    def share_work(self, model: nn.Module) -> None:
        """Share the matrices among the processes of the DistributedDataParallel around `model`.

        This is for loops that wrap the model after the optimizer was built, as accelerate's prepare
        does. Without DDP it changes nothing. Sharded parameters are shared out in any case.
        """
        self.process_group = replicas_of(model)

    def _check_rates(self) -> None:
        for group in self.param_groups:
            rate, decay = group["lr"] * group["lr_ratio"], group["weight_decay"]
            if not 0 <= rate < float("inf") or rate * decay > 1:
                raise ConfigError(
                    f"LipschitzMuon: rate {rate:g} with weight_decay {decay:g}: a rate must be "
                    "finite and not negative, and rate * weight_decay at most 1, or the decay "
                    "turns the weights around."
                )

    def _step_matrices(self, group: dict[str, Any], written: set[int]) -> None:
        rate = group["lr"] * group["lr_ratio"]
        moved = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        weights = [group["params"][i] for i in moved]
        layouts = [Layout.from_plain(group["layouts"][i]) for i in moved]
        measure = self._steps_taken % _MEASURE_EVERY == 0
        unknown = {i for i, w in enumerate(weights) if measure or id(w) in written}
        self._keep_idle_(group, written)
        grads, buffers = momentum_(self.state, weights, group)
        if rate == 0 and not unknown:
            # The first steps of a warmup may have rate 0. Nothing moves, so nothing is projected.
            return

        def work(mine: list[int], wholes: list[Tensor], updates: list[Tensor]) -> None:
            theirs = [layouts[i] for i in mine]
            above = [k for k, i in enumerate(mine) if i in unknown]
            normalize_above_([wholes[k] for k in above], [theirs[k] for k in above])
            # Of sharded weights `updates` holds Nesterov's update already (see `extra` below), and
            # the lerp of it with itself leaves it alone. Else `updates` is empty.
            starts = updates or [grads[i] for i in mine]
            ends = updates or [buffers[i] for i in mine]
            for batch in batches(wholes, theirs) if rate else ():
                # Nesterov's update is made batch by batch, to save the memory of another model.
                between = gathered_lerp(
                    batch.at(starts, theirs), batch.at(ends, theirs), group["momentum"]
                )
                self._step_batch(batch, between, rate, group)

        on_owners(
            weights,
            work,
            replicas=self.process_group,
            costs=[cost_of(w, layout) for w, layout in zip(weights, layouts, strict=True)],
            extra=lambda i: torch.lerp(grads[i], buffers[i], group["momentum"]),
        )
        self._watch.remember(weights)

    def _keep_idle_(self, group: dict[str, Any], written: set[int]) -> None:
        """Bring matrices within their caps that have no gradient but were written to."""
        idle = [
            (p, Layout.from_plain(layout))
            for p, layout in zip(group["params"], group["layouts"], strict=True)
            if p.grad is None and id(p) in written
        ]
        if idle:
            weights = [p for p, _ in idle]
            normalize_above_(weights, [layout for _, layout in idle], self.process_group)
            self._watch.remember(weights)

    def _step_batch(self, batch: Batch, update: Tensor, rate: float, group: dict[str, Any]) -> None:
        """Move and project blocks of one shape that were within their cap before."""
        d_out, d_in = update.shape[-2:]
        decay = group["weight_decay"]
        step = orthogonalize(
            update,
            steps=group["steps"],
            dtype=update_precision(group["precision"], update),
            # On a CPU this check costs nothing, and it comes before any change.
            check_finite=update.device.type == "cpu",
        )
        alone = len(batch.views) == 1 and batch.views[0].dtype == step.dtype  # needs no copies
        blocks = batch.views[0] if alone else batch.gather()
        narrow = blocks.dtype != step.dtype
        if decay:
            blocks = (
                blocks.mul_(1 - rate * decay)
                if not narrow
                else blocks.to(step.dtype) * (1 - rate * decay)
            )
        blocks = blocks.to(step.dtype).add_(step, alpha=-rate * (d_out / d_in) ** 0.5)
        began = time.perf_counter()
        if batch.cap is not None:
            # s <- (1 - rate wanted)(s + rate) has its fixed point at 1 / wanted - rate: the cap.
            wanted = 1.0 / (batch.cap + rate) if "weight_decay" in group["method"] else decay
            # The slacks cover rounding: 1e-5 of the last projection, the other of this step.
            upper = (1 - rate * decay) * batch.cap * (1 + 1e-5) + rate * (1 + _ORTHOGONAL_SLACK)
            try:
                blocks = project(
                    blocks.to(batch.views[0].dtype),
                    batch.cap,
                    group["method"],
                    lr=rate,
                    weight_decay=wanted,
                    norm_upper=None if narrow else upper,
                    in_place=True,
                )
            except BaseException:
                # When memory runs out, say, the weight has moved and must not stay above its cap.
                if alone:
                    batch.views[0].mul_(batch.cap / upper)
                raise
        if not alone:
            batch.scatter_(blocks)
        self.seconds_projecting += time.perf_counter() - began

    def _step_rows(self, group: dict[str, Any]) -> None:
        step_rows_(group, self.state)

    def _step_factors(self, group: dict[str, Any]) -> None:
        """Move low-rank adapters; the hook of attach_projection caps the sum."""
        moved = [p for p in group["params"] if p.grad is not None]
        grads, buffers = momentum_(self.state, moved, group)
        updates = [torch.lerp(g, m, group["momentum"]) for g, m in zip(grads, buffers, strict=True)]
        step_factors_(
            group,
            {id(p): u for p, u in zip(moved, updates, strict=True)},
            lambda update: update_precision(group["precision"], update),
        )

    def _step_adamw(self, group: dict[str, Any]) -> None:
        step_adamw_(group, self.state)
