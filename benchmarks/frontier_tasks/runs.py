"""The runs of the frontier as a plain table, and the optimizers that they name.

A run is data. To add one, add a Run to `mlp_runs` or `char_runs`. Its name is its key in the
results file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lip_plugin import LipschitzMuon, attach_projection
from lip_plugin.config_values import METHOD_NAMES
from lip_plugin.model.position import OffsetBias
from lip_plugin.optim.groups import POSITION_RATE

CAPS = (0.5, 1.0, 1.5, 2.5, 4.0, 8.0)
# The learning rates that are tried. LipschitzMuon's are in RMS->RMS norm per step, those of
# torch.optim.Muon in spectral norm.
RATES = {
    "lipschitz_muon": (0.02, 0.06, 0.2),
    "muon": (0.02, 0.06, 0.2),
    "adamw": (1e-3, 4e-3, 1.6e-2),
}
# What a budget is, task by task. For char, `brief` is the one of depth.py: 0.41 M characters, and a
# model half as wide. For char, `quick` is 0.41 M characters in bf16 autocast (scored
# and proven in float32) and takes two minutes a run, for maps of many. `small` is 3.07 M
# characters. `full` has the batch and the model of the Shakespeare sweeps that arXiv 2507.13338
# released (batch 64, length 256); its 2000 steps are 32.8 M characters.
_MLP = {"batch": 128, "widths": (128, 128), "examples": 360, "refine": 4, "attack": (2, 20)}
_CHAR = {"width": 256, "length": 256}
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {
    "mlp": {
        "smoke": {
            **{"steps": 3, "batch": 32, "widths": (16,)},
            **{"examples": 20, "refine": 1, "attack": (1, 3)},
        },
        "quick": {"steps": 40, **_MLP},
        "small": {"steps": 120, **_MLP},
        "full": {
            **{"steps": 3000, "batch": 512, "widths": (256, 256)},
            **{"examples": 2000, "refine": 9, "attack": (4, 40)},
        },
    },
    "char": {
        "smoke": {
            **{"steps": 2, "batch": 2, "width": 32, "length": 16},
            **{"examples": 2, "refine": 0, "attack": (1, 2)},
        },
        "brief": {
            **{"steps": 200, "batch": 16, "width": 128, "length": 128},
            **{"examples": 8, "refine": 2, "attack": (1, 6)},
        },
        "quick": {
            **{"steps": 200, "batch": 8, **_CHAR, "autocast": True},
            **{"examples": 2, "refine": 1, "attack": (1, 6)},
        },
        "small": {
            **{"steps": 1500, "batch": 8, **_CHAR},
            **{"examples": 8, "refine": 8, "attack": (3, 20)},
        },
        "full": {
            **{"steps": 2000, "batch": 64, **_CHAR},
            **{"examples": 32, "refine": 4, "attack": (4, 40)},
        },
    },
}


@dataclass(frozen=True)
class Run:
    """One line of the table.

    Attributes:
        name: key in the results file.
        config: arguments of LipschitzConfig; None trains without any constraint.
        optimizer: one of RATES.
        rates: learning rates; of several the best is chosen on the first seed (see frontier.py).
        steps: optimizer steps; None takes the budget's.
        temperature: logits are divided by it in the training loss, and nowhere else.
        options: more arguments of the optimizer.
        loss: for task char: `label_smoothing`, and `margin`, which is taken from the right logit
            before the temperature divides.
        family: for task char: "gpt2", "llama", "qwen3" or "gemma3".
    """

    name: str
    config: Mapping[str, Any] | None
    optimizer: str
    rates: tuple[float, ...]
    steps: int | None = None
    temperature: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, float] = field(default_factory=dict)
    family: str = "gpt2"

    def plain(self) -> dict[str, Any]:
        """JSON types, as a results file holds them; the plain loss and "gpt2" are left out."""
        values = {
            **vars(self),
            "config": self.config and dict(self.config),
            "options": dict(self.options),
        }
        values["loss"] = dict(self.loss)
        if not self.loss:
            del values["loss"]
        if self.family == "gpt2":
            del values["family"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k != "name"}


def mlp_runs() -> list[Run]:
    """The runs of task mlp.

    They are baselines, every method with every optimizer at every cap, and one method at another
    temperature.
    """
    runs = [Run(f"unconstrained/{o}", None, o, RATES[o]) for o in RATES]
    for method in METHOD_NAMES:
        for optimizer, rates in RATES.items():
            for cap in CAPS:
                config = {"method": method, "w_max": cap}
                runs.append(Run(f"{method}/{optimizer}/{cap:g}", config, optimizer, rates))
    for optimizer, rates in RATES.items():
        for cap in CAPS:
            config = {"method": "soft_cap", "w_max": cap}
            name = f"soft_cap, temperature 0.1/{optimizer}/{cap:g}"
            runs.append(Run(name, config, optimizer, rates, temperature=0.1))
    return runs


_OFFSET_RATE = POSITION_RATE * 0.1
# AdamW's step is a number for each entry. A rate of 4e-3, which an MLP likes, is a step of norm 1
# for a matrix of width 256. With soft_cap or spectral_normalize the matrix then learns nothing
# (docs/LOG.md, 2026-11-25).
_CHAR_RATES = {"lipschitz_muon": (0.1,), "muon": (0.06,), "adamw": (5e-4, 2e-3)}


def char_runs() -> list[Run]:
    """The runs of task char.

    They are baselines with norms and biases, and by method, optimizer and cap the paper's recipe
    and attention by position alone.
    """
    runs = [
        Run("unconstrained/adamw", None, "adamw", (1e-3, 4e-3)),
        Run("unconstrained/muon", None, "muon", (0.02, 0.06)),
    ]
    for method in METHOD_NAMES:
        for optimizer, rates in _CHAR_RATES.items():
            for cap in (1.0, 1.2, 2.0, 4.0):
                config = {"method": method, "w_max": cap, "biases": "drop", "logit_scale": 1.0}
                runs.append(Run(f"{method}/{optimizer}/{cap:g}", config, optimizer, rates))
    return runs + position_runs() + position_map() + preset_runs()


# What a bound of 1 is best spent on, found by leaving one out at a time: docs/LOG.md, 2026-11-24.
POSITION: dict[str, Any] = {
    "position_bias": "learned",
    "attention_scale": 0,
    "value_scale": 1.0,
    "residual": [0.75, 0.9],
    "activation": "abs",
    "biases": "drop",
    "logit_scale": 1.0,  # the training temperature does it: bounds are at the network's own scale
}


def position_runs() -> list[Run]:
    """Attention by position alone, absolute values as activation.

    There is one run for each training temperature, then one for each choice that is undone.
    """
    options = {"embedding_lr": 0.05}

    def run(
        name: str, temperature: float, loss: Mapping[str, float] | None = None, **changes: Any
    ) -> Run:
        config = {**POSITION, **changes}
        key = f"position, {name}/lipschitz_muon/{config.get('w_max', 1.0):g}"
        return Run(key, config, "lipschitz_muon", (0.1,), None, temperature, options, loss or {})

    runs = [run(f"temperature {t:g}", t) for t in (0.5, 0.3, 0.2, 0.1, 0.05, 0.025, 0.015)]
    undone: dict[str, dict[str, Any]] = {
        "fixed ALiBi": {"position_bias": "alibi"},
        "content too": {"attention_scale": 0.5},
        "gelu": {"activation": None},
        "residual 0.5": {"residual": 0.5},
        "hard cap": {"method": "hard_cap"},
        "a higher cap": {"w_max": 1.2},
        "label smoothing 0.1": {"loss": {"label_smoothing": 0.1}},
        "margin 0.1": {"loss": {"margin": 0.1}},
        "margin 0.3": {"loss": {"margin": 0.3}},
        "margin 0.5": {"loss": {"margin": 0.5}},
        "margin 1": {"loss": {"margin": 1.0}},
    }
    return runs + [
        run(f"temperature 0.05, {name}", 0.05, **changes) for name, changes in undone.items()
    ]


def preset_runs() -> list[Run]:
    """The presets as a user gets them, on two families, by the factor on their logits.

    A factor of 40 is a training temperature of 1 / 40. Bounds are at the network's own scale, so
    the factor is in the loss alone.
    """
    scales = {"accurate": (5, 10, 20, 40, 80), "robust": (2, 5, 10, 20)}
    runs = []
    for family, (preset, factors) in itertools.product(("gpt2", "llama"), scales.items()):
        for factor in factors:
            config = {"preset": preset, "logit_scale": 1.0}
            key = f"{preset}, logits x {factor}, {family}/lipschitz_muon/1"
            runs.append(Run(key, config, "lipschitz_muon", (0.1,), None, 1 / factor, family=family))
    return runs


def position_map() -> list[Run]:
    """Attention by position alone at temperature 0.1, by method, optimizer and two caps."""
    runs = []
    for method in METHOD_NAMES:
        for optimizer, rates in _CHAR_RATES.items():
            options = {"embedding_lr": 0.05} if optimizer == "lipschitz_muon" else {}
            for cap in (1.0, 1.4):
                config = {**POSITION, "method": method, "w_max": cap}
                name = f"position, {method}/{optimizer}/{cap:g}"
                runs.append(Run(name, config, optimizer, rates, None, 0.1, options))
    return runs


class Steps:
    """Optimizers of one run, stepped together, their rates falling linearly to 0."""

    def __init__(self, run: Run, model: nn.Module, lr: float, steps: int) -> None:
        self.optimizers = _optimizers(run, model, lr)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda s: max(0.0, 1.0 - s / steps))
            for o in self.optimizers
        ]

    def take(self, loss: torch.Tensor) -> None:
        """One step down the loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()


def _optimizers(run: Run, model: nn.Module, lr: float) -> list[Any]:
    """Each projects what it has moved."""
    options = dict(run.options)
    if run.optimizer == "lipschitz_muon":
        # It projects by itself, and knows the rate of position tables.
        return [LipschitzMuon(model, lr=lr, **options)]
    offsets = [
        m.weight for m in model.modules() if isinstance(m, OffsetBias) and m.weight.requires_grad
    ]
    named = [
        (n, p)
        for n, p in model.named_parameters()
        if p.requires_grad and all(p is not table for table in offsets)
    ]
    if run.optimizer == "adamw":
        found: list[Any] = [
            torch.optim.AdamW(
                [p for _, p in named],
                lr=lr,
                **{"weight_decay": 0.0, "betas": (0.9, 0.99), **options},
            )
        ]
    elif run.optimizer == "muon":
        rest_lr = options.pop("adamw_lr", 4e-3)
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for _, p in named if p.dim() == 2 and id(p) not in tables]
        rest = [p for _, p in named if p.dim() != 2 or id(p) in tables]
        found = (
            [torch.optim.AdamW(rest, lr=rest_lr, weight_decay=0.0, betas=(0.9, 0.99))]
            if rest
            else []
        )
        found.append(
            torch.optim.Muon(
                matrices, lr=lr, **{"weight_decay": 0.0, "adjust_lr_fn": "original", **options}
            )
        )
    else:
        raise ValueError(f"optimizer {run.optimizer!r}: choose one of {', '.join(RATES)}")
    if offsets:  # at the rate that LipschitzMuon gives them in these runs
        found.insert(
            0, torch.optim.AdamW(offsets, lr=_OFFSET_RATE, weight_decay=0.0, betas=(0.9, 0.99))
        )
    if run.config is not None:
        attach_projection(found, model)
    return found
