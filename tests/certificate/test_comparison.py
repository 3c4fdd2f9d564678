"""A model that is not its graph is refused, whichever part differs.

Each test breaks a part, sees it refused, and mends it.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lip_plugin import certify
from lip_plugin.certificate.comparison.compare import check_graph
from lip_plugin.certificate.graph.build import build
from lip_plugin.errors import CertificateError
from tests.support.families import FAMILIES
from tests.support.oracles import paper, random_model

# ---- is the graph the model? ---------------------------------------------------------------------


def scale_output(module: nn.Module, args: Any, output: Any) -> Any:
    return tuple(3 * o for o in output) if isinstance(output, tuple) else 3 * output


BREAKS: dict[str, tuple[str, str, Callable[[Any], Callable[[], None]]]] = {}


def _hook(path: str) -> Callable[[Any], Callable[[], None]]:
    return lambda model: model.get_submodule(path).register_forward_hook(scale_output).remove


def _pre_hook(path: str) -> Callable[[Any], Callable[[], None]]:
    def break_it(model: Any) -> Callable[[], None]:
        handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: (3 * args[0],))
        return handle.remove

    return break_it


def _patched(path: str) -> Callable[[Any], Callable[[], None]]:
    def break_it(model: Any) -> Callable[[], None]:
        module = model.get_submodule(path)
        old = module.forward
        module.forward = types.MethodType(lambda self, x: 3 * old(x), module)
        return lambda: module.__dict__.pop("forward")

    return break_it


def _patched_class(model: Any) -> Callable[[], None]:
    cls = type(model.transformer.h[0].mlp)
    old = cls.forward
    cls.forward = lambda self, x: 3 * old(self, x)

    def mend() -> None:
        cls.forward = old

    return mend


def _everywhere(model: Any) -> Callable[[], None]:
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: 3 * out if type(m).__name__ == "GPT2MLP" else None
    )
    return handle.remove


def _attribute(path: str, name: str, value: Any) -> Callable[[Any], Callable[[], None]]:
    def break_it(model: Any) -> Callable[[], None]:
        module = model.get_submodule(path)
        old = getattr(module, name)
        setattr(module, name, value)
        return lambda: setattr(module, name, old)

    return break_it


LAYER = "transformer.h.1"
BREAKS = {
    "hook on a block": ("gpt2", "remove", _hook(LAYER + ".mlp")),
    "hook on a linear map": ("gpt2", "remove", _hook(LAYER + ".attn.c_attn")),
    "hook on an activation": ("gpt2", "remove", _hook(LAYER + ".mlp.act")),
    "hook on a constant": ("gpt2", "remove", _hook(LAYER + ".ln_1")),
    "hook on the embedding": ("gpt2", "remove", _hook("transformer.wte")),
    "hook on the rotation": ("llama", "remove", _hook("model.rotary_emb")),
    "pre-hook": ("gpt2", "remove", _pre_hook(LAYER + ".mlp")),
    "patched forward": ("gpt2", "remove", _patched(LAYER + ".mlp")),
    "patched activation": ("gpt2", "remove", _patched(LAYER + ".mlp.act")),
    "patched class": ("gpt2", "remove", _patched_class),
    "hook on all modules": ("gpt2", "remove", _everywhere),
    "another kind of activation": (
        "gpt2",
        "remove",
        _attribute(LAYER + ".mlp.act", "kind", "gelu"),
    ),
    "another eps inside a norm": (
        "nanogpt",
        "keep",
        lambda model: _eps(model.get_submodule(LAYER + ".ln_1")),
    ),
}


def _eps(module: Any) -> Callable[[], None]:
    module.forward = types.MethodType(
        lambda self, x: nn.functional.layer_norm(
            x, self.weight.shape, self.weight, self.bias, 1e-9
        ),
        module,
    )
    return lambda: module.__dict__.pop("forward")


@pytest.mark.parametrize("after_a_check", [False, True])
@pytest.mark.parametrize("what", BREAKS)
def test_a_model_that_is_not_its_graph_is_refused_until_mended(
    what: str, after_a_check: bool
) -> None:
    name, norms, break_it = BREAKS[what]
    if name not in FAMILIES:
        pytest.skip("no nanoGPT stand-in")
    model = random_model(name, paper(norms=norms))
    if after_a_check:
        certify(model)
    mend = break_it(model)
    try:
        with pytest.raises(CertificateError, match="reproduce|rule is proven|compared"):
            certify(model)
    finally:
        mend()
    assert certify(model).lipschitz < math.inf


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("part", ["tau", "branch", "slot", "bias", "head"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ten_percent_of_any_part_is_seen(
    name: str, part: str, factor: float, monkeypatch: Any
) -> None:
    """A change of the graph by 10 % in one place of its last block is refused."""
    import lip_plugin.certificate.comparison.compare as compare

    def broken(model: nn.Module) -> Any:
        graph = build(model)
        attention_block, mlp_block = graph.body.nodes[2:4]
        if part == "tau":
            attention_block.branch.nodes[1].nodes[0].tau *= factor
        elif part == "branch":
            mlp_block.branch.nodes[-1].scale *= factor
        elif part == "slot":
            attention_block.branch.nodes[0].scale *= factor
        elif part == "bias" and name == "gpt2":
            inner, read = mlp_block.branch.nodes[1], mlp_block.branch.nodes[1].bias
            inner.bias = lambda: factor * read()
        else:
            head, read_head = graph.body.nodes[-1], graph.body.nodes[-1].weight
            head.weight = lambda: factor * read_head()
        return graph

    monkeypatch.setattr(compare, "build", broken)
    with pytest.raises(CertificateError, match="reproduce"):
        check_graph(build(random_model(name, paper())))


def test_settings_changed_after_a_check_are_seen() -> None:
    """Settings that change after a check are seen.

    The logit scale is read anew each time, and a config that changes is compared again.
    """
    model = random_model("llama", paper())
    before = certify(model)
    model.model.layers[1].self_attn.scaling *= 2  # the one with the larger logits
    assert certify(model).lipschitz > before.lipschitz
    assert certify(model).attention_logit > before.attention_logit


def test_a_check_is_remembered_without_marking_the_model(monkeypatch: Any) -> None:
    """The comparison on random weights is made once, and the shorter one each time.

    The shorter one runs on the model's own weights.
    """
    import lip_plugin.certificate.comparison.compare as compare

    made, real = [], compare.random_values
    monkeypatch.setattr(compare, "random_values", lambda: made.append(1) or real())
    model = random_model("llama", paper(norms="keep"))
    for _ in range(2):
        assert 0 < check_graph(build(model)) < compare.TOLERANCE
    model.train()
    check_graph(build(model))
    assert len(made) == 1
    assert not [key for key in vars(model) if "checked" in key]
    model.model.layers[0].self_attn.scaling *= 2
    check_graph(build(model))
    assert len(made) == 2
