"""What an independent attack found on the side of the optimizer: caps hold, or an error comes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lip_plugin import LipschitzMuon, attach_projection, retrofit
from lip_plugin.errors import ConfigError, NonFiniteError
from lip_plugin.optim.groups import param_groups
from tests.support.families import tiny
from tests.support.oracles import CAP_TOLERANCE, paper, worst_over_cap

IDS = torch.arange(48).reshape(4, 12) % 67


def capped() -> Any:
    model = tiny("gpt2")
    retrofit(model, paper())
    return model


def backward(model: Any) -> None:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()


def _flip(weight: torch.Tensor) -> None:
    weight.data.abs_()


def _shuffle(weight: torch.Tensor) -> None:
    weight.data.copy_(weight.data.flatten().sort().values.view_as(weight))


def _swap_rows(weight: torch.Tensor) -> None:
    """The order of all rows; each row is as it was."""
    weight.data.copy_(weight.data.flatten(0, -2).flip(0).view_as(weight))


def _turn_rows(weight: torch.Tensor) -> None:
    weight.data[::2] *= -1


@pytest.mark.parametrize("write", [_flip, _shuffle, _swap_rows, _turn_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_write_is_overlooked(write: Any, dtype: torch.dtype) -> None:
    from lip_plugin.optim.guard import Guard

    weight = torch.randn(48, 32).to(dtype)
    guard = Guard()
    guard.remember([weight])
    place = guard._known[id(weight)]
    write(weight)
    guard._known[id(weight)] = ((weight.data_ptr(), weight._version), place[1])
    assert float(guard._moved([weight])[0]) > 0


@pytest.mark.parametrize("write", [_flip, _shuffle])
@pytest.mark.parametrize("when", ["before the gradient", "after it"])
def test_writes_that_keep_the_frobenius_norm_are_seen(write: Any, when: str) -> None:
    model = capped()
    optimizer = LipschitzMuon(model, lr=0.05)
    for _ in range(3):
        backward(model)
        optimizer.step()
    weight = model.transformer.h[0].mlp.c_fc.weight
    if when == "after it":
        backward(model)
    write(weight)
    assert worst_over_cap(model) > 1.2  # it did harm
    if when != "after it":
        backward(model)
    optimizer.step()
    assert worst_over_cap(model) <= 1 + CAP_TOLERANCE


def test_a_weight_without_a_gradient_that_was_written_to_is_brought_back() -> None:
    model = capped()
    optimizer = LipschitzMuon(model)
    backward(model)
    optimizer.step()
    backward(model)
    for name in ("h.0.mlp.c_fc", "wte"):
        layer = model.transformer.get_submodule(name)
        with torch.no_grad():
            layer.weight.mul_(30)
        layer.weight.grad = None
    optimizer.step()
    assert worst_over_cap(model) <= 1 + CAP_TOLERANCE


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_is_frozen_while_it_has_a_gradient_is_projected(momentum: float) -> None:
    model = capped()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0, momentum=momentum)
    attach_projection(optimizer, model)
    backward(model)
    model.lm_head.weight.requires_grad_(False)
    optimizer.step()
    assert worst_over_cap(model) <= 1 + CAP_TOLERANCE


def test_what_another_hook_clears_is_projected_too() -> None:
    model = capped()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    optimizer.register_step_post_hook(lambda o, args, kwargs: o.zero_grad())
    attach_projection(optimizer, model)
    backward(model)
    model.lm_head.weight.requires_grad_(False)
    optimizer.step()
    assert worst_over_cap(model) <= 1 + CAP_TOLERANCE


@pytest.mark.parametrize("frozen", [False, True])
def test_a_replaced_weight_is_an_error_frozen_or_not(frozen: bool) -> None:
    model = capped()
    optimizer = LipschitzMuon(model)
    layer = model.transformer.h[0].mlp.c_fc
    layer.weight = nn.Parameter(layer.weight.detach() * 30, requires_grad=not frozen)
    backward(model)
    with pytest.raises(ConfigError, match="not among"):
        optimizer.step()


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_optimizer_asks_for_its_model(make: Any) -> None:
    model = capped()
    optimizer = LipschitzMuon(model)
    backward(model)
    optimizer.step()
    pair = (model, optimizer)
    model, again = make(pair)
    backward(model)
    with pytest.raises(ConfigError, match=r"optimizer\.watch\(model\)"):
        again.step()
    again.watch(model)
    again.step()
    assert worst_over_cap(model) <= 1 + CAP_TOLERANCE
    model.lm_head.weight = model.transformer.wte.weight
    with pytest.raises(Exception, match="share one Parameter"):
        again.step()


def test_groups_of_adapters_need_the_model() -> None:
    import peft

    model = peft.get_peft_model(
        capped(), peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True)
    )
    with pytest.raises(ConfigError, match="Pass the model"):
        LipschitzMuon(param_groups(model, 0.1, 0.1, 0.01))


class Afterwards:
    """An optimizer around another one, which writes behind the inner one's step."""

    def __init__(self, inner: torch.optim.Optimizer, weight: torch.Tensor) -> None:
        self.optimizer, self.weight = inner, weight
        self.param_groups = inner.param_groups
        self.register_step_post_hook = inner.register_step_post_hook
        self.register_step_pre_hook = inner.register_step_pre_hook


def test_only_accelerates_wrapper_is_looked_through() -> None:
    from lip_plugin.optim.enforce import _innermost

    inner = torch.optim.SGD(capped().parameters(), lr=0.1)
    outer = Afterwards(inner, torch.zeros(1))
    assert _innermost(outer) is outer
    assert _innermost(inner) is inner


def test_a_group_of_another_kind_is_an_error() -> None:
    model = capped()
    optimizer = LipschitzMuon(model)
    for group in optimizer.param_groups:
        if group["kind"] == "matrix":
            group["kind"] = "adamw"
    backward(model)
    with pytest.raises(ConfigError, match="kind 'adamw'"):
        optimizer.step()


def test_an_inf_of_the_optimizer_is_not_called_unchanged() -> None:
    model = capped()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach_projection(optimizer, model)
    backward(model)
    model.lm_head.weight.grad[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="The optimizer's step has put it there"):
        optimizer.step()
