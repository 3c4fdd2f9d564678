"""LipschitzMuon: steps of known norm, and a projection that keeps every block within its cap.

A matrix block moves by lr * sqrt(d_out/d_in) * (its momentum, orthogonalized): at most lr in the
RMS->RMS norm. So a block that was within its cap is within cap + lr after the move, and the
projection knows that without measuring. This is what makes the constraint cheap.
Source: arXiv 2507.13338, sections 3 and 4; Muon is Keller Jordan's, kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lip_plugin.distributed.owners import local, on_owners, replicas_of
from lip_plugin.errors import ConfigError
from lip_plugin.face import require_module
from lip_plugin.linalg.polar import orthogonalize
from lip_plugin.linalg.projections import project
from lip_plugin.model.batches import Batch, batches, cost_of, gathered_lerp
from lip_plugin.model.layout import Layout, clamp_rows_
from lip_plugin.optim.enforce import attach_projection, keep_within_caps_, normalize_above_
from lip_plugin.optim.groups import KINDS, param_groups, refuse_other_groups
from lip_plugin.optim.guard import Guard
from lip_plugin.optim.intact import Held
from lip_plugin.optim.lora import KIND as FACTORS
from lip_plugin.optim.lora import step_factors_
from lip_plugin.surgery.state import constraints_of

# Strings, because they live in param_groups and so in state_dicts.
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# How far above 1 rounding may leave sigma_max of an orthogonalized block: tests/linalg/test_polar.py, bf16.
_ORTHOGONAL_SLACK = 2e-3
# That margin, and the rounding of a float32 projection, are tested, not proven. So every this many
# steps all blocks are measured (a proven bound) and what is above its cap is divided: nothing can add up.
_MEASURE_EVERY = 100
# Of a group: what belongs to the model of now, not to a saved state.
_OWN = ("layouts", "pairs", "kind", "method", "param_names")
_BF16_FROM = 256  # wide: below, bf16 saves nothing on a CPU (measured), so nothing is rounded to it


class LipschitzMuon(torch.optim.Optimizer):
    """Muon with a projection for constrained matrices, row steps for embeddings, AdamW for the rest.

    Args:
        params: a retrofitted model, or parameter groups as `lip_plugin.optim.groups.param_groups`
            makes them.
        lr: rate of the matrices, in RMS->RMS norm per step; carries over between widths.
        embedding_lr: rate of embedding rows, in RMS norm per step; None takes `lr`.
        adapter_lr: rate of peft's LoRA factors, in RMS->RMS norm per step of W0 + s B A (see optim/factors.py); None takes
            `lr`. They have no weight decay.
        adamw_lr: rate of everything else (biases, kept norms, DoRA's magnitudes, OFT, HRA); tables of position biases go by
            lr / 2.
        momentum: of matrices and rows; nesterov is always on.
        weight_decay: decoupled, on matrices and rows: W <- (1 - lr * weight_decay) W - update.
        betas, eps, adamw_weight_decay: of the AdamW inside.
        steps: of the orthogonalization; with 5, singular values of the update lie in [0.75, 1].
        precision: of the orthogonalization, `"float32"` or `"bfloat16"`; None takes bfloat16 where it is
            faster: on CUDA, and on a CPU with bf16 instructions for blocks from 256 wide on. The
            projection is computed in float32 either way.
        process_group: its members hold equal copies of the parameters and of the gradients (DDP): each matrix is then
            stepped by one of them, and handed to the others. None takes that of the DistributedDataParallel that
            `params` is, and otherwise lets every process step for itself. Sharded parameters (FSDP2) are
            always shared out, over the group that they are sharded over.

    Schedulers act on each group's `lr`; a group's rate is lr * lr_ratio. Frozen matrices are brought within their caps
    when the optimizer is built from a model; write to one later, and it takes a `project_(model)`.

    Raises:
        ConfigError: rates that are not positive, or groups without `kind`.
        NotRetrofittedError: a model that `retrofit` was not applied to.
        NonFiniteError: at a step, a gradient with nan or inf: named, before anything is changed, on all processes.
        DistributedError: at a step, processes that do not agree on which parameters have gradients.
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
            if rate is not None and not 0 < rate < float("inf"):
                raise ConfigError(
                    f"LipschitzMuon({name}={rate!r}): a rate must be a finite number above 0."
                )
        if not 0 <= momentum < 1 or not 0 <= weight_decay < float("inf"):
            raise ConfigError(
                "LipschitzMuon: momentum must lie in [0, 1) and weight_decay must not be negative."
            )
        if precision is not None and precision not in _PRECISIONS:
            raise ConfigError(
                f"LipschitzMuon(precision={precision!r}): choose None or one of {list(_PRECISIONS)}."
            )
        if not isinstance(params, (list, tuple, dict, Iterator)):  # those are told what groups are
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
                    "LipschitzMuon takes a retrofitted model, or the groups that lip_plugin.optim.groups."
                    f"param_groups(model, ...) makes: dictionaries with a kind in {KINDS} and layouts."
                )
            if group["kind"] in ("matrix", "row") and len(group.get("layouts", ())) != len(
                list(group["params"])
            ):
                raise ConfigError(
                    f"LipschitzMuon: a group of kind {group['kind']!r} needs one layout for each of its params, "
                    "as lip_plugin.optim.groups.param_groups(model, ...) makes them."
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
        self._held = held
        self.process_group = process_group
        if model is not None:
            self.process_group = process_group if process_group is not None else replicas_of(model)
            keep_within_caps_(
                model, self.process_group, only_frozen=True
            )  # no step would look at those
        if model is not None and any(hasattr(m, "lora_A") for m in model.modules()):
            attach_projection(self, model)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
        # a pickle has none; loading a state keeps the run's own
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("_held", None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Momenta, rates and step counts of a saved state; caps, kinds and methods stay this optimizer's own.

        They say what the model of now was retrofitted with: the saved ones may be of other caps, or of other parameters.

        Raises CheckpointError, before anything is changed, if the saved groups are of other kinds or sizes.
        """
        refuse_other_groups(state_dict["param_groups"], self.param_groups)
        own = [{k: g[k] for k in _OWN if k in g} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept)
        # torch casts what it loads to the parameter's dtype; a momentum is float32 of bf16 weights as well
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
        self._steps_taken = 0  # only paces the measurements

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the closure's loss if a closure was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_rates()
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
        """Let the processes of the DistributedDataParallel around `model` step a share of the matrices each.

        For loops that wrap the model after the optimizer was built, as accelerate's prepare does. Without DDP it
        changes nothing; what is sharded is shared out anyway.
        """
        self.process_group = replicas_of(model)

    def _check_rates(self) -> None:
        for group in self.param_groups:
            rate, decay = group["lr"] * group["lr_ratio"], group["weight_decay"]
            if not 0 <= rate < float("inf") or rate * decay > 1:
                raise ConfigError(
                    f"LipschitzMuon: rate {rate:g} with weight_decay {decay:g}: a rate must be finite and not negative, "
                    "and rate * weight_decay at most 1, or the decay turns the weights around."
                )

    def _momentum_(
        self, weights: list[Tensor], group: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(gradients, momentum buffers moved towards them), in float32 or wider: the parts that are here."""
        grads, buffers = [], []
        for p in weights:
            assert p.grad is not None
            wide = torch.promote_types(p.grad.dtype, torch.float32)
            grads.append(local(p.grad).to(wide))
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, dtype=wide)
            buffers.append(local(self.state[p]["momentum"]))
        if weights:
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        return grads, buffers

    def _step_matrices(self, group: dict[str, Any], written: set[int]) -> None:
        rate = group["lr"] * group["lr_ratio"]
        moved = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        weights = [group["params"][i] for i in moved]
        layouts = [Layout.from_plain(group["layouts"][i]) for i in moved]
        measure = self._steps_taken % _MEASURE_EVERY == 0
        unknown = {i for i, w in enumerate(weights) if measure or id(w) in written}
        grads, buffers = self._momentum_(weights, group)
        if rate == 0 and not unknown:
            # as a warmup's later steps at rate 0: nothing moves, so nothing needs a projection
            return

        def work(mine: list[int], wholes: list[Tensor], updates: list[Tensor]) -> None:
            theirs = [layouts[i] for i in mine]
            above = [k for k, i in enumerate(mine) if i in unknown]
            normalize_above_([wholes[k] for k in above], [theirs[k] for k in above])
            starts = updates or [grads[i] for i in mine]
            ends = updates or [buffers[i] for i in mine]
            for batch in batches(wholes, theirs) if rate else ():
                # Nesterov, batch by batch: whole updates of all weights would cost another model's memory
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

    def _step_batch(self, batch: Batch, update: Tensor, rate: float, group: dict[str, Any]) -> None:
        """Move and project the blocks of one shape; all of them were within their cap before."""
        d_out, d_in = update.shape[-2:]
        decay = group["weight_decay"]
        step = orthogonalize(
            update,
            steps=group["steps"],
            dtype=_precision(group["precision"], update),
            check_finite=update.device.type
            == "cpu",  # costs nothing there, and comes before any change
        )
        alone = len(batch.views) == 1 and batch.views[0].dtype == step.dtype  # then without copies
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
            # The slack covers rounding: of this step, and of the one before.
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
                # out of memory, say: the weight has moved already, and must not stay above its cap
                if alone:
                    batch.views[0].mul_(batch.cap / upper)
                raise
        if not alone:
            batch.scatter_(blocks)
        self.seconds_projecting += time.perf_counter() - began

    def _step_rows(self, group: dict[str, Any]) -> None:
        """Each row with a gradient moves by at most rate in RMS norm; rows unseen this step stay."""
        rate = group["lr"] * group["lr_ratio"]
        for p, plain in zip(group["params"], group["layouts"]):
            if p.grad is None:
                continue
            (grad,), (buffer,) = self._momentum_([p], group)
            here = local(p)  # whole rows, so their norms need nothing from elsewhere
            update = torch.lerp(grad, buffer, group["momentum"])
            seen = (grad != 0).any(-1, keepdim=True)
            largest = update.abs().amax(
                -1, keepdim=True
            )  # first, so that no square over- or underflows
            update = torch.where(seen & (largest > 0), update / largest, 0.0)
            size = update.square().mean(-1, keepdim=True).sqrt()
            update = torch.where(size > 0, update / size, 0.0)
            here.mul_(1 - rate * group["weight_decay"]).add_(update.to(p.dtype), alpha=-rate)
            for segment, rows in Layout.from_plain(plain).views(here):
                if segment.cap is not None:
                    clamp_rows_(rows, segment.cap)

    def _step_factors(self, group: dict[str, Any]) -> None:
        """Low-rank adapters; what they add up to is brought within the caps by attach_projection's hook."""
        moved = [p for p in group["params"] if p.grad is not None]
        grads, buffers = self._momentum_(moved, group)
        updates = [torch.lerp(g, m, group["momentum"]) for g, m in zip(grads, buffers, strict=True)]
        step_factors_(
            group,
            {id(p): u for p, u in zip(moved, updates, strict=True)},
            lambda update: _precision(group["precision"], update),
        )

    def _step_adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if "exp_avg" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw(
            [local(p) for p in params],
            [local(p.grad) for p in params],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"] * group["lr_ratio"],
            weight_decay=group["adamw_weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


@lru_cache(maxsize=1)
def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products (AVX-512 BF16, AMX); without, torch emulates them."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _precision(chosen: str | None, update: Tensor) -> torch.dtype | None:
    """What to orthogonalize `update` in; None leaves it to `orthogonalize`."""
    if chosen is not None:
        return _PRECISIONS[chosen]
    wide = max(update.shape[-2:]) >= _BF16_FROM and update.dtype == torch.float32
    return (
        torch.bfloat16 if wide and update.device.type == "cpu" and _cpu_multiplies_bf16() else None
    )
