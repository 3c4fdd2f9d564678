"""A certificate is of the very object that was passed.

What stands around the model is known, or refused by name.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lip_plugin import (
    LipschitzConfig,
    attacked_accuracy,
    certified_radius,
    certify,
    drift,
    falsify,
)
from lip_plugin.certificate.comparison.structure import structure_of
from lip_plugin.certificate.graph.build import build
from lip_plugin.errors import CertificateError, UnsupportedModelError
from lip_plugin.model.wrappers import Wrapper, exactly, register_wrapper
from tests.support.families import FAMILIES, tiny
from tests.support.oracles import paper, random_model

# torch.compile imports what is deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
IDS = torch.arange(24).reshape(2, 12) % 67


@pytest.fixture
def model() -> Any:
    return random_model("gpt2", paper())


class Louder(nn.Module):
    """A hundred times the logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, ids: torch.Tensor) -> Any:
        out = self.inner(ids)
        out.logits = out.logits * 100
        return out


class Same(Louder):
    """A wrapper that changes no logit, which nobody can know."""

    def forward(self, ids: torch.Tensor) -> Any:
        return self.inner(ids)


class Subclass(nn.DataParallel):
    """Of a known wrapper, with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.module(*args, **kwargs)
        out.logits = out.logits * 100
        return out


class Two(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.first, self.second = a, b


UNKNOWN: dict[str, Callable[[Any], nn.Module]] = {
    "a module that scales the logits": Louder,
    "a module that does nothing": Same,
    "a module that holds two": lambda m: Two(m, tiny("gpt2")),
    "two wrappers, of which one is unknown": lambda m: nn.DataParallel(Louder(m)),
    "a subclass of a known wrapper": Subclass,
    "a sequence": lambda m: nn.Sequential(m, nn.Identity()),
    "a list": lambda m: nn.ModuleList([m]),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_an_unknown_wrapper_is_refused_by_name(what: str, model: Any) -> None:
    wrapped = UNKNOWN[what](model)
    calls: list[Callable[[], Any]] = [
        lambda: certify(wrapped),
        lambda: certify(wrapped, "caps"),
        lambda: falsify(wrapped, 1, 1),
        lambda: certified_radius(wrapped, IDS),
        lambda: attacked_accuracy(wrapped, [IDS]),
        lambda: drift(wrapped, model),
        lambda: certify(model).verify(wrapped),
    ]
    for call in calls:
        with pytest.raises(UnsupportedModelError, match="Pass the model|holds"):
            call()


def test_known_wrappers_are_looked_through(model: Any) -> None:
    expected = certify(model).lipschitz
    for wrapped in (
        nn.DataParallel(model),
        torch.compile(model),
        torch.compile(nn.DataParallel(model)),
    ):
        assert certify(wrapped).lipschitz == expected


def test_a_registered_wrapper_is_looked_through_and_still_compared(model: Any) -> None:
    from lip_plugin.model import wrappers

    path = f"{__name__}."
    try:
        register_wrapper(
            Wrapper("test", exactly(path + "Same", path + "Louder"), lambda m: m.inner)
        )
        assert certify(Same(model)).lipschitz == certify(model).lipschitz
        with pytest.raises(CertificateError, match="behind the last layer"):
            certify(Louder(model))
    finally:
        del wrappers._WRAPPERS["test"]


def _louder(module: nn.Module, args: Any, out: Any) -> Any:
    out.logits = out.logits * 100
    return out


def test_hooks_on_wrappers_are_seen(model: Any) -> None:
    compiled = torch.compile(model)
    compiled.register_forward_hook(_louder)
    with pytest.raises(CertificateError, match="behind the last layer"):
        certify(compiled)
    parallel = nn.DataParallel(model)
    parallel.register_forward_hook(_louder)
    with pytest.raises(UnsupportedModelError, match="hook"):
        certify(parallel)
    patched = nn.DataParallel(model)
    patched.forward = lambda ids: Louder(model)(ids)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="patched forward"):
        certify(patched)


# ---- what is remembered --------------------------------------------------------------------------


def test_a_hook_that_takes_the_place_of_a_freed_one_is_compared(model: Any) -> None:
    """Keys made of ids took the second hook for the first one in 12 of 12 tries."""
    for _ in range(12):
        handle = model.transformer.h[0].mlp.register_forward_hook(lambda m, a, o: None)
        assert certify(model).lipschitz > 0
        handle.remove()
        del handle
        handle = model.transformer.h[0].mlp.register_forward_hook(lambda m, a, o: o * 1000)
        with pytest.raises(CertificateError, match="reproduce"):
            certify(model)
        handle.remove()


def test_a_forward_that_takes_the_place_of_a_freed_one_is_compared(model: Any) -> None:
    mlp = model.transformer.h[0].mlp
    real = type(mlp).forward
    for _ in range(12):
        mlp.forward = lambda x: real(mlp, x)
        assert certify(model).lipschitz > 0
        mlp.forward = lambda x: real(mlp, x) * 1000
        with pytest.raises(CertificateError, match="reproduce"):
            certify(model)
        del mlp.forward


class Gain:
    def __init__(self) -> None:
        self.gain = 1.0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output * self.gain


def _attribute(mlp: Any) -> Callable[[], None]:
    hook = Gain()
    mlp.register_forward_hook(hook)
    return lambda: setattr(hook, "gain", 1000.0)


def _buffer(mlp: Any) -> Callable[[], None]:
    mlp.register_buffer("gain", torch.ones(()), persistent=False)
    mlp.register_forward_hook(lambda m, a, o: o * m.gain)
    return lambda: mlp.gain.fill_(1000.0)


def _closure(mlp: Any) -> Callable[[], None]:
    state = {"gain": 1.0}
    mlp.register_forward_hook(lambda m, a, o: o * state["gain"])
    return lambda: state.update(gain=1000.0)


def _patched(mlp: Any) -> Callable[[], None]:
    state, real = {"gain": 1.0}, type(mlp).forward
    mlp.forward = lambda x: real(mlp, x) * state["gain"]
    return lambda: state.update(gain=1000.0)


@pytest.mark.parametrize("kept_in", [_attribute, _buffer, _closure, _patched])
def test_state_that_changes_after_the_comparison_is_seen(kept_in: Any, model: Any) -> None:
    change = kept_in(model.transformer.h[0].mlp)
    assert certify(model).lipschitz > 0
    change()
    with pytest.raises(CertificateError, match="reproduce"):
        certify(model)


def test_a_hook_that_changes_nothing_is_compared_each_time_and_nothing_is_remembered(
    model: Any,
) -> None:
    assert structure_of(build(model)) is not None
    seen: list[int] = []
    handle = model.transformer.h[0].register_forward_hook(lambda m, a, o: seen.append(1))
    assert structure_of(build(model)) is None
    assert certify(model).lipschitz == certify(model).lipschitz
    assert len(seen) == 4  # random weights and its own, twice
    handle.remove()
    assert structure_of(build(model)) == structure_of(build(model))


def test_comparing_leaves_everything_as_it_was(model: Any) -> None:
    model.train()
    model.transformer.h[0].mlp.eval()
    flags = [m.training for m in model.modules()]
    before = {k: (v, v.detach().clone()) for k, v in model.named_parameters()}
    certify(model)
    handle = model.transformer.h[1].attn.register_forward_hook(lambda m, a, o: 1 / 0)
    with pytest.raises(CertificateError, match="ZeroDivisionError"):
        certify(model)
    handle.remove()
    assert [m.training for m in model.modules()] == flags
    after = dict(model.named_parameters())
    assert all(after[k] is p and torch.equal(p, value) for k, (p, value) in before.items())
    assert not any(m._forward_pre_hooks for m in model.transformer.h)


# ---- any size ------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1.0, 1e9])
def test_the_comparison_is_right_at_any_scale(factor: float) -> None:
    """Logits of 1e-29 and of 1e9 are compared, and a hook on them is seen."""
    model = random_model("llama", paper(), num_hidden_layers=8).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    assert certify(model).lipschitz > 0
    handle = model.lm_head.register_forward_hook(lambda m, a, o: 1.01 * o)
    with pytest.raises(CertificateError, match="behind the last layer"):
        certify(model)
    handle.remove()
    deep = copy.deepcopy(model)
    deep.model.layers[7].mlp.register_forward_hook(lambda m, a, o: 1.01 * o)
    with pytest.raises(CertificateError, match="layers.7"):
        certify(deep)


def test_the_robust_preset_on_eight_gated_layers_is_certified() -> None:
    """The robust preset on eight gated layers is certified, though logits are about 1e-29.

    The comparison once divided 0 by 0 there, and blamed the user.
    """
    from lip_plugin import retrofit

    model = tiny("llama", num_hidden_layers=8)
    retrofit(model, LipschitzConfig.preset("robust", activation=None))
    assert certify(model).log10_lipschitz < 10


def test_saturated_attention_is_compared_too() -> None:
    """Saturated attention is compared too.

    Rounding inside a library is magnified there, and the graph says by how much.
    """
    model = random_model("llama", paper(norms="keep"))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(300.0)
    assert certify(model).lipschitz > 0
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, o: 1.2 * o)
    with pytest.raises(CertificateError, match="layers.0"):
        certify(model)


def test_a_branch_that_no_node_stands_for_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="crossattention"):
        certify(tiny("gpt2", add_cross_attention=True))


# ---- what libraries add is known -----------------------------------------------------------------


def test_patches_of_accelerate_are_known_and_remembered() -> None:
    """Patches of accelerate are known and remembered.

    Every Trainer with bf16=True has them: autocast to bf16, and outputs in float32.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # of a test before, in float32
    expected = certify(random_model("gpt2", paper())).lipschitz
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(random_model("gpt2", paper()))
    assert "forward" in vars(model)
    assert structure_of(build(model)) is not None
    assert certify(model).lipschitz == expected
    # what the patch calls is looked at, not what it says of itself
    inner = vars(model)["forward"].__func__.__wrapped__
    real = inner.model_forward

    @functools.wraps(real)
    def louder(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        out.logits = out.logits * 100
        return out

    inner.model_forward = louder
    assert structure_of(build(model)) is None
    with pytest.raises(CertificateError, match="behind the last layer"):
        certify(model)
    AcceleratorState._reset_state()


def test_gradient_checkpointing_and_its_hooks_are_known(model: Any) -> None:
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    assert structure_of(build(model)) is not None
    assert certify(model).lipschitz > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_remembered(name: str) -> None:
    """A second certificate of any family costs one small forward only.

    Nothing that a library builds counts as foreign.
    """
    for norms in ("remove", "keep"):
        one = random_model(name, paper(norms=norms))
        assert structure_of(build(one)) == structure_of(build(one)) is not None
