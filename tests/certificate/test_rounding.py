"""The bound of rounding of the forward pass is above what float32 and bfloat16 do."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lip_plugin import project_, retrofit
from lip_plugin.certificate.diagnostics.rounding import _FUNCTION, forward_rounding_upper
from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.activations import ACTIVATIONS
from tests.support.families import FAMILIES, inputs_for, tiny
from tests.support.oracles import logits_of, paper, randomize_


def small(family: str) -> torch.nn.Module:
    model = tiny(family)
    retrofit(model, paper(w_max=1.0))
    randomize_(model)
    project_(model)
    return model


def error(model: torch.nn.Module, family: str, tokens: int) -> float:
    """Token norm of logits in the model's own dtype minus those in float64, same stored weights."""
    dtype = next(model.parameters()).dtype
    x = inputs_for(family, 8, tokens)
    x = x.to(dtype) if x.is_floating_point() else x  # pixels that both can represent
    exact = logits_of(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
    return float((logits_of(model, x).double() - exact).detach().square().mean(-1).sqrt().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_stays_within_its_bound_and_the_bound_says_something(family: str) -> None:
    model = small(family)
    upper, seen = forward_rounding_upper(model, torch.float32, 32), error(model, family, 32)
    assert 0 < seen <= upper
    assert (
        upper < 0.01
    )  # worst cases of every sum at once: far above what is seen, far below the logits


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_stay_within_theirs(family: str, dtype: torch.dtype) -> None:
    model = small(family).to(dtype)
    assert 0 < error(model, family, 16) <= forward_rounding_upper(model, dtype, 16)


def test_the_bound_grows_with_the_unit_and_with_the_length() -> None:
    model = small("gpt2")
    units = [
        forward_rounding_upper(model, t, 16) for t in (torch.float64, torch.float32, torch.bfloat16)
    ]
    assert units[0] < 1e-7 * units[1] < units[2]
    assert forward_rounding_upper(model, torch.float32, 8) < units[1]


def test_a_kept_norm_is_too_steep_near_zero_to_say_anything() -> None:
    model = tiny("llama")
    assert forward_rounding_upper(model, torch.bfloat16, 8) == math.inf


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="float8"):
        forward_rounding_upper(small("gpt2"), torch.float8_e4m3fn, 8)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_library_functions_are_within_the_units_they_are_granted(kind: str) -> None:
    """Activations of the library are within the error that the bound grants them.

    f(z) is within `_FUNCTION` units of abs(z), and exp within as many of itself, at four million
    float32 points.
    """
    x = torch.linspace(-20.0, 20.0, 1 << 22)
    unit = 2.0**-24
    off = (
        ACTIVATIONS[kind](x).double() - ACTIVATIONS[kind](x.double())
    ).abs() / x.double().abs().clamp_min(1e-30)
    assert float(off.max()) <= _FUNCTION * unit
    off = (x.exp().double() / x.double().exp() - 1).abs()
    assert float(off.max()) <= _FUNCTION * unit
