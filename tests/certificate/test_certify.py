"""Of whole models, attained <= proven from weights <= proven from caps.

Refusals and JSON are here too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lip_plugin import Certificate, certify, falsify, project_, release
from lip_plugin.certificate.graph.attention import smallest_entropy_lower
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.weight_norms import cap_norms, weight_norms
from lip_plugin.errors import CertificateError, ConfigError, NonFiniteError, UnsupportedModelError
from tests.support.families import FAMILIES, HEADS
from tests.support.oracles import paper, random_model
from tests.support.worst_cases import one_head_gpt2, published_claim

# ---- whole models --------------------------------------------------------------------------------

SETTINGS = {
    "head": paper(w_max=1.5),
    "matrix": paper(granularity="matrix", residual=0.4, attention_scale=2.0),
    "keep": paper(norms="keep"),
    "drop": paper(biases="drop", w_max=3.0, overrides={"lm_head": 0.5}),
}


# short attacks suffice to show a factor that is missing; the slow suite looks for the rest
ATTACKS = [
    {"restarts": 1, "steps": 4, "tokens": 9},
    pytest.param({"restarts": 3, "steps": 12, "tokens": 9}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=["short", "long"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_lower_is_below_upper_and_weights_are_below_caps(
    name: str, setting: str, attack: dict[str, int]
) -> None:
    config = SETTINGS[setting]
    if "lm_head" in config.overrides:
        config = replace(config, overrides={HEADS.get(name, "lm_head"): 0.5})
    if name.startswith(
        "gpt_neox"
    ):  # whose fused rows are interleaved: test_families has the refusal
        config = replace(config, granularity="head")
    model = random_model(name, config)
    upper = certify(model)
    if setting == "head" or attack["restarts"] > 1:  # weights beyond the caps
        assert 0 < falsify(model, **attack).lower_bound <= upper.lipschitz
    project_(model)
    weights, caps = certify(model), certify(model, "caps")
    assert 0 < falsify(model, **attack).lower_bound <= weights.lipschitz <= caps.lipschitz
    assert weights.radius <= caps.radius
    assert weights.attention_logit <= caps.attention_logit
    for mine, capped in zip(weights.layers, caps.layers, strict=True):
        assert mine.name == capped.name
        assert mine.lipschitz <= capped.lipschitz
        assert mine.radius <= capped.radius


@pytest.mark.parametrize("name", FAMILIES)
def test_untouched_models_are_certified_too(name: str) -> None:
    """An untouched model gets an honest number, with its norms and tied heads."""
    model = random_model(name, None)
    assert (
        falsify(model, restarts=1, steps=4, tokens=9).lower_bound
        <= certify(model).lipschitz
        < math.inf
    )
    with pytest.raises(CertificateError, match="has no cap"):
        certify(model, "caps")


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_measured_norms_are_above_svd_and_within_caps(name: str) -> None:
    """Measured norms are above a float64 SVD by at most 0.1 %, and below the caps' norms."""
    model = random_model(name, paper())
    project_(model)
    graph = build(model)
    measured, capped = weight_norms(graph), cap_norms(graph)
    for role, node_name, module, weight in graph.linears():
        matrix = module.layout.matrix(weight).detach().double()
        truth = float(torch.linalg.matrix_norm(matrix, 2))
        assert truth <= float(measured[node_name].sigma)
        assert measured[node_name].sigma <= capped[node_name].sigma
        assert float(matrix.norm(dim=-1).max()) <= float(measured[node_name].row)
        if role in ("q", "k", "v", "qkv"):
            for segment, blocks in module.layout.views(weight):
                exact = torch.linalg.svdvals(blocks.detach().double())[:, 0].tolist()
                heads = measured[node_name].heads[segment.role]
                assert all(e <= float(h) <= e * 1.001 for e, h in zip(exact, heads, strict=True))
                pairs = zip(heads, capped[node_name].heads[segment.role], strict=True)
                assert all(h <= c for h, c in pairs)
                assert (
                    measured[node_name].whole[segment.role] <= capped[node_name].whole[segment.role]
                )
        else:
            assert float(measured[node_name].sigma) <= truth * 1.001


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_stored_dtype_is_certified_as_stored(dtype: torch.dtype) -> None:
    model = random_model("llama", paper()).to(dtype)
    upper = certify(model)
    assert falsify(model, restarts=3, steps=10).lower_bound <= upper.lipschitz
    assert certify(model.double()).lipschitz == pytest.approx(
        upper.lipschitz, rel=1e-3
    )  # norms' margin


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own import
def test_wrappers_are_looked_through() -> None:
    for config in (None, paper()):
        model = random_model("gpt2", config)
        expected = certify(model).lipschitz
        assert certify(nn.DataParallel(model)).lipschitz == expected
        assert (
            certify(torch.compile(model)).lipschitz == expected
        )  # nothing is compiled before a call


def test_one_head_models_exceed_the_published_formula_and_not_ours() -> None:
    for heads in (4, 12):
        model = one_head_gpt2(heads)
        lower = falsify(model, restarts=2, steps=30).lower_bound
        assert published_claim(model) < lower <= certify(model).lipschitz


def test_removing_norms_makes_the_number_human() -> None:
    kept, removed = (certify(random_model("llama", paper(norms=n))) for n in ("keep", "remove"))
    assert kept.log10_lipschitz > removed.log10_lipschitz + 10


def test_numbers_beyond_floats_keep_their_logarithm() -> None:
    model = random_model("gpt2", paper(norms="keep"))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e25)
    certificate = certify(model, check=False)
    assert certificate.lipschitz == math.inf
    assert 308 < certificate.log10_lipschitz < 2000
    assert "10^" in str(certificate)
    again = Certificate.from_json(certificate.to_json())
    assert again == certificate


def test_certifying_takes_little_time() -> None:
    model = random_model("gpt2", paper())
    certify(model)
    began = time.process_time()
    certify(model)
    assert time.process_time() - began < 0.5  # 0.02 s alone; room for a busy machine


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["transformer.h.0.mlp.c_fc.bias", "transformer.h.0.ln_1.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("source", ["weights", "caps"])
def test_non_finite_parameters_are_refused_by_name(where: str, value: float, source: str) -> None:
    model = random_model("gpt2", paper(norms="keep"))
    with torch.no_grad():
        model.get_parameter(where).view(-1)[0] = value
    with pytest.raises(NonFiniteError, match=where):
        certify(model, source)


def test_unknown_modules_are_refused() -> None:
    model = random_model("gpt2", paper())
    model.transformer.h[0].mlp.c_fc = nn.Bilinear(2, 2, 2)
    with pytest.raises(UnsupportedModelError, match="c_fc"):
        certify(model)
    model = random_model("gpt2", None)
    model.transformer.h[0].mlp.act = nn.Hardswish()
    with pytest.raises(UnsupportedModelError, match="no proven slope"):
        certify(model)
    model = random_model("gpt2", None)
    model.transformer.ln_f = nn.BatchNorm1d(32)
    with pytest.raises(UnsupportedModelError, match="without a proven rule"):
        certify(model)
    with pytest.raises(UnsupportedModelError, match="No architecture"):
        certify(nn.Linear(2, 2))


def test_caps_are_gone_after_release_and_sources_are_checked() -> None:
    model = random_model("gpt2", paper())
    project_(model)
    assert certify(model, "caps").source == "caps"
    release(model)
    with pytest.raises(CertificateError, match="no cap"):
        certify(model, "caps")
    with pytest.raises(ConfigError, match="source"):
        certify(model, "norms")


def test_assumptions_name_what_caps_do_not_cover() -> None:
    models = [
        random_model("gpt2", paper(norms="keep")),
        random_model("llama", paper()),
    ]
    for model in models:
        project_(model)
    free, covered = (certify(model, "caps").assumptions for model in models)
    assert any("gains of kept norms" in line for line in free)
    assert not any("gains of kept norms" in line for line in covered)
    assert any("1.001" in line for line in covered)


# ---- JSON ----------------------------------------------------------------------------------------


def test_json_goes_both_ways_for_every_family() -> None:
    for name in FAMILIES:
        certificate = certify(random_model(name, paper()))
        again = Certificate.from_json(certificate.to_json())
        assert again == certificate
        assert str(again) == str(certificate)
        assert len(str(certificate).splitlines()) == len(certificate.layers) + 5
        assert again.smallest_entropy_lower(8) == smallest_entropy_lower(
            certificate.attention_logit, 8
        )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"format": "another/1"}',
        '{"lipschitz": 3}',
        "not json",
        b"\xff\xfe\xff",
        None,
    ],
)
def test_foreign_text_is_refused(text: Any) -> None:
    with pytest.raises(CertificateError):
        Certificate.from_json(text)


def test_edited_or_truncated_certificates_are_refused() -> None:
    text = certify(random_model("gpt2", paper())).to_json()
    outer = json.loads(text)
    edits: list[Callable[[dict[str, Any]], Any]] = [
        lambda c: c.update(lipschitz=c["lipschitz"] / 2),
        lambda c: c["layers"].pop(),
        lambda c: c["layers"][0].update(radius=0.0),
        lambda c: c.pop("radius"),
        lambda c: c.update(source="caps"),
        lambda c: c.update(extra=1),
    ]
    for edit in edits:
        changed = json.loads(text)
        edit(changed["certificate"])
        with pytest.raises(CertificateError, match="digest"):
            Certificate.from_json(json.dumps(changed))
    for length in (10, len(text) // 2, len(text) - 3):
        with pytest.raises(CertificateError):
            Certificate.from_json(text[:length])
    outer.pop("digest")
    with pytest.raises(CertificateError, match="digest"):
        Certificate.from_json(json.dumps(outer))
