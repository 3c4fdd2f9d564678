"""A certificate belongs to one function.

The function is made of the weights and of every number, flag, activation and adapter that enters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lip_plugin import Certificate, LipschitzMuon, certify, project_
from lip_plugin.certificate.function_facts import function_of
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.result import check_same
from lip_plugin.errors import CertificateError, LipschitzError
from lip_plugin.stated import _digest, _encode
from tests.support.families import FAMILIES
from tests.support.oracles import paper, random_model, randomize_
from tests.support.peft_models import base_of, tuner


def _set(path: str, name: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        module = model.get_submodule(path)
        setattr(module, name, change(getattr(module, name)))

    return edit


def _branch(model: Any) -> None:
    hook = next(iter(model.transformer.h[0].mlp._forward_hooks.values()))
    hook.scale *= 10


def _activation(model: Any) -> None:
    model.transformer.h[0].mlp.act = nn.Tanh()


def _hook(model: Any) -> None:
    model.transformer.h[0].mlp.register_forward_hook(lambda m, a, o: 2 * o)


EDITS: dict[str, tuple[str, str | None, Callable[[Any], None]]] = {
    "the final scale": ("gpt2", None, _set("transformer.ln_f", "scale", lambda s: 10 * s)),
    "a branch's scale": ("gpt2", None, _branch),
    "the scale of attention": (
        "gpt2",
        None,
        _set("transformer.h.0.attn", "scaling", lambda s: 10.0),
    ),
    "an activation": ("gpt2", None, _activation),
    "the scale of embeddings": (
        "gemma3",
        "keep",
        _set("model.embed_tokens", "embed_scale", lambda s: s * 10),
    ),
    "an eps": ("llama", "keep", _set("model.norm", "variance_epsilon", lambda e: 10 * e)),
    "a window": ("gemma2", "keep", _set("model.layers.0.self_attn", "sliding_window", lambda w: 3)),
    "a hook": ("gpt2", None, _hook),
}


@pytest.mark.parametrize("source", ["weights", "caps"])
@pytest.mark.parametrize("what", EDITS)
def test_an_edited_function_is_not_the_one_that_was_certified(what: str, source: str) -> None:
    family, norms, edit = EDITS[what]
    model = random_model(family, paper(norms=norms))
    project_(model)
    certificate = certify(model, source)
    certificate.verify(model)
    edit(model)
    with pytest.raises(CertificateError, match="is .* and was|reproduce"):
        certificate.verify(model)


def adapted() -> Any:
    model: Any = peft.get_peft_model(base_of("llama", 4.0), tuner("lora", "llama"))
    model.add_adapter("other", tuner("lora", "llama"))
    randomize_(model)
    return model


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "another adapter": lambda m: m.set_adapter("other"),
    "another scaling": lambda m: m.base_model.model.model.layers[0].mlp.up_proj.scaling.update(
        default=3.0
    ),
    "adapters disabled": lambda m: m.base_model.disable_adapter_layers(),
    "adapters merged": lambda m: m.merge_adapter(),
}


@pytest.mark.filterwarnings("ignore:Adapter.*:UserWarning")
@pytest.mark.parametrize("what", ADAPTERS)
def test_adapters_are_part_of_the_function(what: str) -> None:
    model = adapted()
    certificate = certify(model)
    certificate.verify(model)
    ADAPTERS[what](model)
    with pytest.raises(CertificateError):
        certificate.verify(model)
    assert certify(model).lipschitz > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_plain_number_of_every_node_is_in_the_function(name: str) -> None:
    """A change of any number of any node changes the text of the function.

    Each scale, eps, tau, cap, window and kind is changed by itself.
    """
    graph = build(random_model(name, paper(norms="keep")))
    before, changed = function_of(graph), 0
    from lip_plugin.certificate.graph.containers import walk

    for node in walk(graph.body.nodes):
        for key, value in list(vars(node).items()):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            setattr(node, key, value + 1)
            assert function_of(graph) != before, (node.name, key)
            setattr(node, key, value)
            changed += 1
    assert changed > 10
    assert function_of(graph) == before


def test_certificates_of_before_say_nothing_of_the_function_and_still_verify() -> None:
    model = random_model("gpt2", paper())
    certificate = certify(model)
    settings = {k: v for k, v in certificate.settings.items() if k != "function"}
    replace(certificate, settings=settings).verify(model)


# ---- from caps, and edited files -----------------------------------------------------------------


def test_a_bound_from_caps_needs_blocks_within_them() -> None:
    model = random_model("gpt2", paper())
    project_(model)
    assert certify(model, "caps").lipschitz > 0
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e38
    with pytest.raises(CertificateError, match=r"h\.0\.mlp\.c_fc is .* times its cap.*project_"):
        certify(model, "caps")
    project_(model)
    assert certify(model, "caps").lipschitz > 0


def _lowered(certificate: Certificate, **changes: Any) -> Certificate:
    """A certificate as a forger edits it, with its digest computed anew."""
    body = {
        **json.loads(certificate.to_json())["certificate"],
        **{k: _encode(v) for k, v in changes.items()},
    }
    text = json.dumps(
        {"format": "lip_plugin.certificate/2", "digest": _digest(body), "certificate": body}
    )
    return Certificate.from_json(text)


def test_every_number_of_a_certificate_is_reproduced() -> None:
    model = random_model("gpt2", paper())
    certificate = certify(model)
    check_same(_lowered(certificate), certificate)
    c = certificate
    layers = json.loads(c.to_json())["certificate"]["layers"]
    lower_layer = [{**layers[0], "lipschitz": 0.5 * layers[0]["lipschitz"]}, *layers[1:]]
    edits: dict[str, Any] = {
        "lipschitz": c.lipschitz / 2,
        "log10_lipschitz": c.log10_lipschitz - 0.3,
        "logit_difference": c.logit_difference / 2,
        "attention_logit": c.attention_logit / 2,
        "radius": c.radius / 2,
        "d_in": c.d_in * 2,
        "d_out": c.d_out // 2,
        "norm": "2-norm -> 2-norm",
        "source": "caps",
        "layers": lower_layer,
    }
    for key, value in edits.items():
        with pytest.raises(CertificateError, match="edited"):
            check_same(_lowered(certificate, **{key: value}), certificate)
    with pytest.raises(CertificateError, match="edited"):
        check_same(_lowered(certificate, layers=layers[1:]), certificate)


def test_verify_runs_the_object_that_it_was_given() -> None:
    model = random_model("gpt2", paper())
    certificate = certify(model)
    with pytest.raises(LipschitzError):
        certificate.verify(nn.Sequential(model))
    compiled_like = nn.DataParallel(model)
    certificate.verify(compiled_like)
    LipschitzMuon(model)
