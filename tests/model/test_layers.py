"""Leaf modules have the slopes that are claimed, and can be swapped, pickled and copied."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.activations import SLOPE_UPPER, ScaledActivation, activation_kind
from lip_plugin.model.layers import (
    Constrained,
    ConstrainedEmbedding,
    ConstrainedLinear,
    constrain_,
    constrained_modules,
    is_linear,
    is_transposed,
    unconstrain_,
)
from lip_plugin.model.layout import RMS_TO_RMS, ROW, Layout, Segment, clamp_rows_, one_block
from lip_plugin.model.scales import BranchScale, ConstantScale, branch_scale, set_branch_scale_

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "abs": torch.abs,
}


def leaf(kind: str) -> tuple[nn.Module, Layout]:
    """A plain layer of each kind and a layout that covers it (two blocks, but for the table)."""
    pair = (Segment("q", 0, 1, 6, 1.0), Segment("k", 6, 2, 3, 0.5))
    if kind == "Linear":
        return nn.Linear(8, 12), Layout(RMS_TO_RMS, False, pair)
    if kind == "Conv1D":
        return Conv1D(12, 8), Layout(RMS_TO_RMS, True, pair)
    return nn.Embedding(9, 8), one_block("token", 9, 1.0, norm=ROW)


KINDS = ("Linear", "Conv1D", "Embedding")


def inputs(kind: str) -> torch.Tensor:
    return torch.randint(9, (2, 5)) if kind == "Embedding" else torch.randn(2, 5, 8)


@pytest.mark.parametrize("kind", sorted(SLOPE_UPPER))
def test_slope_bounds_are_above_the_largest_slope_and_within_a_millionth_of_it(kind):
    """Slope bounds are above the largest slope, and within a millionth of it.

    Slopes are by autograd in float64, on a fine grid and on a finer one around its maximum.
    """

    def slopes(x):
        x.requires_grad_(True)
        return torch.autograd.grad(ACTIVATIONS[kind](x).sum(), x)[0]

    grid = torch.linspace(-40.0, 40.0, 800_001, dtype=torch.float64)
    best = slopes(grid.clone()).abs()
    at = float(grid[best.argmax()])
    fine = slopes(torch.linspace(at - 2e-4, at + 2e-4, 100_001, dtype=torch.float64)).abs()
    largest = max(float(best.max()), float(fine.max()))
    assert largest <= SLOPE_UPPER[kind]
    # the bound is one in the last of eight decimals; the grid misses a maximum by less than 1e-12
    assert SLOPE_UPPER[kind] - largest <= 1.1e-8


@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu_tanh", "silu", "abs"])
def test_what_the_radius_rule_uses_holds_too(kind):
    """Activations do not lengthen a token, because abs(f(z)) <= abs(z)."""
    z = torch.linspace(-50.0, 50.0, 200_001, dtype=torch.float64)
    assert bool((ACTIVATIONS[kind](z).abs() <= z.abs()).all())


@pytest.mark.parametrize("kind", sorted(SLOPE_UPPER))
def test_a_scaled_activation_is_the_activation_over_its_slope(kind):
    act = ScaledActivation(ACTIVATIONS[kind], kind)
    x = torch.linspace(-9.0, 9.0, 999, dtype=torch.float64)
    assert torch.allclose(act(x) * SLOPE_UPPER[kind], ACTIVATIONS[kind](x), rtol=1e-15, atol=0)
    assert kind in repr(act)
    assert activation_kind(act) == kind


def test_an_activation_without_a_slope_cannot_be_scaled():
    with pytest.raises(UnsupportedModelError, match="swish7"):
        ScaledActivation(nn.SiLU(), "swish7")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("relu", "relu"),
        ("tanh", "tanh"),
        ("quick_gelu", None),
        ("gelu_10", None),
        ("relu2", None),
        ("leaky_relu", None),
        ("relu6", None),
        ("mish", None),
        ("sigmoid", None),
        ("linear", None),
    ],
)
def test_an_activation_is_known_by_its_class_and_values(name, kind):
    assert activation_kind(ACT2FN[name]) == kind


def test_a_look_alike_activation_is_not_trusted():
    class SiLUActivation(nn.Module):
        def forward(self, x):
            return nn.functional.silu(
                x
            )  # the right values, but whatever comes next is not ours to know

    assert activation_kind(SiLUActivation()) is None
    assert activation_kind(nn.functional.silu) is None
    assert activation_kind(nn.Sequential(nn.SiLU())) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_swap_keeps_everything_but_the_class(kind):
    module, layout = leaf(kind)
    module.double().eval()
    module.weight.requires_grad_(False)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    module.note = "mine"
    x = inputs(kind) if kind == "Embedding" else inputs(kind).double()
    before, parameters, expected = dict(vars(module)), dict(module.named_parameters()), module(x)
    keys = list(module.state_dict())
    constrain_(module, layout)
    assert isinstance(module, Constrained)
    assert type(module).__name__ == f"Constrained{kind}"
    assert {n: id(p) for n, p in module.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert list(module.state_dict()) == keys
    assert module.weight.dtype == torch.float64
    assert not module.weight.requires_grad
    assert not module.training
    assert torch.equal(module(x), expected)
    assert len(calls) == 2  # the hook is still there
    assert {**vars(module)} == {**before, "layout": layout}


@pytest.mark.parametrize("kind", KINDS)
def test_unconstrain_gives_the_plain_class_back(kind):
    module, layout = leaf(kind)
    plain, attributes = type(module), dict(vars(module))
    constrain_(module, layout)
    unconstrain_(module)
    assert type(module) is plain
    assert dict(vars(module)) == attributes
    unconstrain_(module)  # nothing to do
    assert type(module) is plain


@pytest.mark.parametrize("kind", KINDS)
def test_constraining_twice_replaces_the_layout_and_still_comes_off_in_one(kind):
    module, layout = leaf(kind)
    plain = type(module)
    constrain_(module, layout)
    other = one_block(
        "up", 12 if kind != "Embedding" else 9, 3.0, transposed=layout.transposed, norm=layout.norm
    )
    constrain_(module, other)
    assert module.layout == other
    unconstrain_(module)
    assert type(module) is plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", ["pickle", "deepcopy", "torch"])
def test_copies_are_equal_independent_and_still_constrained(kind, through):
    module, layout = leaf(kind)
    constrain_(module, layout)
    if through == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif through == "deepcopy":
        twin = copy.deepcopy(module)
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    x = inputs(kind)
    assert type(twin) is type(module)
    assert twin.layout == layout
    assert twin.weight is not module.weight
    assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_layers_are_told_apart_before_and_after(kind):
    module, layout = leaf(kind)
    for _ in range(2):
        assert is_linear(module) == (kind != "Embedding")
        assert is_transposed(module) == (kind == "Conv1D")
        constrain_(module, layout)
    assert [name for name, _ in constrained_modules(nn.Sequential(module, nn.ReLU()))] == ["0"]
    assert kind in repr(module)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_constrained_at_different_times_are_of_one_class(kind):
    (first, layout), (second, _) = leaf(kind), leaf(kind)
    constrain_(first, layout)
    constrain_(second, layout)
    assert type(first) is type(second)
    assert type(pickle.loads(pickle.dumps(first))) is type(first)


def test_a_subclass_of_a_plain_layer_may_compute_anything_and_is_refused():
    class Quantized(nn.Linear):
        pass

    class Table(nn.Embedding):
        pass

    for module in (Quantized(8, 12), Table(9, 8), nn.Conv1d(8, 12, 1), nn.Bilinear(2, 2, 2)):
        cls, weight = type(module), module.weight.detach().clone()
        assert not is_linear(module)
        with pytest.raises(UnsupportedModelError, match=cls.__name__):
            constrain_(module, one_block("up", 12, 1.0))
        assert type(module) is cls
        assert torch.equal(module.weight, weight)


def test_the_constrained_classes_are_their_parents_and_have_no_norm_in_their_names():
    """Constrained classes are their parents and have no "Norm" in their names.

    _init_weights of transformers and accelerate match on such names.
    """
    from lip_plugin.model import layers as modules

    assert issubclass(ConstrainedLinear, nn.Linear)
    assert issubclass(ConstrainedEmbedding, nn.Embedding)
    assert issubclass(modules.ConstrainedConv1D, Conv1D)
    for cls in (
        ConstrainedLinear,
        ConstrainedEmbedding,
        modules.ConstrainedConv1D,
        ConstantScale,
        ScaledActivation,
    ):
        assert "norm" not in cls.__name__.lower()
    with pytest.raises(AttributeError, match="ConstrainedConv2D"):
        _ = modules.ConstrainedConv2D


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_constant_scale_multiplies_and_keeps_dtype(dtype):
    x = torch.randn(3, 4).to(dtype)
    assert torch.equal(ConstantScale(0.25)(x), x * 0.25)
    assert ConstantScale(0.3)(x).dtype == dtype
    assert torch.equal(ConstantScale(1.0)(x), x)
    assert not ConstantScale(0.3).state_dict()
    assert "0.3" in repr(ConstantScale(0.3))


def test_a_branch_scale_scales_the_first_output_and_can_be_replaced_and_removed():
    class Attention(nn.Module):
        def forward(self, x):
            return x, "weights"

    module, x = Attention(), torch.randn(3)
    module.register_forward_hook(lambda m, a, out: (out[0] + 1.0, out[1]))
    set_branch_scale_(module, 0.5)
    set_branch_scale_(module, 0.25)  # replaces, does not stack
    assert branch_scale(module) == 0.25
    assert torch.equal(module(x)[0], (x + 1.0) * 0.25)
    assert module(x)[1] == "weights"
    twin = pickle.loads(pickle.dumps(BranchScale(0.5)))
    assert twin.scale == 0.5
    set_branch_scale_(module, None)
    assert branch_scale(module) == 1.0
    assert torch.equal(module(x)[0], x + 1.0)  # somebody else's hook stays


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_a_layout_shows_its_blocks_without_a_copy(kind):
    module, layout = leaf(kind)
    assert layout.covers(module.weight)
    matrix = module.weight.detach() if kind == "Linear" else module.weight.detach().t()
    views = {s.role: v for s, v in layout.views(module.weight.detach())}
    assert torch.equal(views["q"], matrix[:6].unsqueeze(0))
    assert torch.equal(views["k"], torch.stack([matrix[6:9], matrix[9:12]]))
    views["k"][1, 2, 7] = 42.0
    assert float(matrix[11, 7]) == 42.0
    assert not one_block("up", 11, 1.0, transposed=layout.transposed).covers(module.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_is_plain_data_both_ways(kind):
    """It lives in param_groups and must go through torch.load(weights_only=True)."""
    _, layout = leaf(kind)
    buffer = io.BytesIO()
    torch.save(layout.to_plain(), buffer)
    buffer.seek(0)
    assert Layout.from_plain(torch.load(buffer, weights_only=True)) == layout
    as_lists = [layout.norm, layout.transposed, [list(s) for s in layout.to_plain()[2]]]
    assert Layout.from_plain(as_lists) == layout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [1e-3, 0.5, 1.0, 7.0])
def test_clamped_rows_are_within_the_cap_and_the_others_keep_every_bit(dtype, cap):
    rows = (
        torch.randn(200, 48, dtype=torch.float64)
        * torch.logspace(-3, 3, 200, dtype=torch.float64)[:, None]
    )
    rows[7] = 0.0
    stored = rows.to(dtype)
    before = stored.clone()
    clamp_rows_(stored, cap)
    sizes, were = stored.double().square().mean(-1).sqrt(), before.double().square().mean(-1).sqrt()
    # smallest float16 numbers: an absolute rounding of 6e-8 per entry adds to the relative one
    floor = 6e-8 if dtype == torch.float16 else 0.0
    assert float(sizes.max()) <= cap * (1 + 1e-15) + floor
    kept = were <= cap
    assert torch.equal(stored[kept], before[kept])
    assert bool((sizes[~kept] >= cap * (1 - 16 * torch.finfo(dtype).eps) - floor).all())
    assert math.isfinite(float(sizes.sum()))
