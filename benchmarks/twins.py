"""Optimizers of unconstrained twins. torch.optim.Muon has a precision that the machine can do."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


def muon_precision(device: str) -> str:
    """The precision of torch.optim.Muon in the benchmarks: bfloat16, or float32 where that is slow.

    torch.optim.Muon knows bfloat16 alone. A CPU without instructions for it emulates it, and a step
    then takes twenty times as long as in float32.
    """
    emulated = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "float32" if emulated else "bfloat16"


class TorchMuon(torch.optim.Muon):
    """torch.optim.Muon in the precision of `muon_precision`."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        device = self.param_groups[0]["params"][0].device.type
        if muon_precision(device) == "bfloat16":
            return super().step(closure)
        with mock.patch.object(Tensor, "bfloat16", Tensor.float):
            return super().step(closure)


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers as one.

    torch.optim.Muon steps the matrices inside the blocks and the head, AdamW steps the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.dim() == 2 and "wte" not in n and "wpe" not in n]
        rest = [p for _, p in named if all(p is not m for m in matrices)]
        super().__init__(matrices + rest, {"lr": 0.02})
        self.parts = (TorchMuon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3))
        # The same objects, so that a scheduler reaches both.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
