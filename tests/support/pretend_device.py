"""Steps on a device that this machine does not have, where any read of a value raises.

The tensors are fake: they have shapes, dtypes and a device, and no values. So an operation that
mixes devices fails, and so does every synchronization with the host. Run as a script, because a
device is registered for the whole process:

    python -m tests.support.pretend_device METHOD:FAMILY ...
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
import torch.utils.backend_registration as registration
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lip_plugin import LipschitzConfig, LipschitzMuon, retrofit
from lip_plugin.optim.guard import Guard
from tests.support.families import tiny

DEVICE = "pretend:0"


class _Module(registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def move_(model: nn.Module) -> None:
    """Put fake tensors of the pretended device in the place of all parameters and buffers."""
    made: dict[int, Any] = {}

    def fake(t: Tensor) -> Tensor:
        if id(t) not in made:
            made[id(t)] = torch.empty(t.shape, dtype=t.dtype, device=DEVICE)
            if isinstance(t, nn.Parameter):
                made[id(t)] = nn.Parameter(made[id(t)], requires_grad=t.requires_grad)
        return made[id(t)]

    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else fake(p)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else fake(b)


def steps(method: str, family: str, count: int = 3) -> None:
    """Steps with gradients of no values. The one read of a step, in `Guard.inspect`, is left out.

    What is measured once, when the optimizer is built, is left out as well.
    """
    model = tiny(family)
    retrofit(model, LipschitzConfig(method=method))
    reads = mock.Mock(return_value=set())
    with (
        FakeTensorMode(allow_non_fake_inputs=False),
        mock.patch.object(Guard, "inspect", reads),
        mock.patch("lip_plugin.optim.muon.keep_within_caps_"),
    ):
        move_(model)
        # AdamW of torch counts its steps on the CPU, and reads them there.
        for name, p in model.named_parameters():
            if name.endswith("position_bias.weight"):
                p.requires_grad_(False)
        optimizer = LipschitzMuon(model, lr=0.05)
        for _ in range(count):
            for p in model.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
            optimizer.step()
        assert all(
            t.device == torch.device(DEVICE) for s in optimizer.state.values() for t in s.values()
        )
    assert reads.call_count == count


if __name__ == "__main__":
    registration._setup_privateuseone_for_python_backend("pretend", _Module())
    for words in sys.argv[1:]:
        try:
            steps(*words.split(":"))
            print(f"{words} no read of a value")
        except DataDependentOutputException as error:
            print(f"{words} reads: {error}")
