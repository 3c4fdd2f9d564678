"""calibrate gives floors that change almost nothing, and own_caps changes no bit."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lip_plugin import LipschitzConfig, calibrate, certify, own_caps, release, retrofit
from lip_plugin.errors import ConfigError, NonFiniteError, UnsupportedModelError
from lip_plugin.model.normalization import root_mean_square
from lip_plugin.optim.enforce import keep_within_caps_
from lip_plugin.surgery.block_norms import block_norms
from lip_plugin.training import calibration
from tests.support.families import FAMILIES, inputs_for, tiny
from tests.support.oracles import paper
from tests.support.pretrained_models import lively, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_own_caps_and_floors_of_zero_change_no_bit(family: str) -> None:
    model, inputs = lively(family), inputs_for(family)
    before, weights = logits(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    floors = calibrate(model, [inputs])
    assert torch.equal(before, logits(model, inputs)), "calibrate leaves the model as it was"
    assert not any(m._forward_pre_hooks for m in model.modules())
    config = paper(norms="calibrated", norm_floors=dict.fromkeys(floors, 0.0))
    retrofit(model, LipschitzConfig.from_json(config.to_json()))
    assert all(floor > 0 for floor in floors.values())
    assert torch.equal(before, logits(model, inputs))
    assert {k for k in model.state_dict() if not k.startswith("lm_head")} >= {
        k for k in weights if not k.startswith("lm_head")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_floors_at_the_smallest_token_change_no_bit_but_the_bound(family: str) -> None:
    model, inputs = lively(family), inputs_for(family)
    before, twin = logits(model, inputs), copy.deepcopy(model)
    floors = calibrate(model, [inputs], quantile=0.0)
    own = own_caps(model)
    retrofit(model, paper(norms="calibrated", norm_floors=floors, overrides=own))
    assert torch.equal(before, logits(model, inputs))
    retrofit(twin, paper(norms="keep", overrides=own))
    assert certify(model).log10_lipschitz < certify(twin).log10_lipschitz - 1


@pytest.mark.parametrize("method", ["soft_cap", "hard_cap", "spectral_normalize"])
@pytest.mark.parametrize("family", FAMILIES)
def test_caps_at_a_models_own_norms_change_no_bit(family: str, method: str) -> None:
    model = lively(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    retrofit(model, paper(norms="keep", method=method, overrides=own_caps(model)))
    keep_within_caps_(model)
    now = dict(model.named_parameters())  # an untied head is one more
    assert all(torch.equal(old, now[name]) for name, old in before.items())
    assert max(b.worst_over_cap for b in block_norms(model)) <= 1 + 1e-6


def test_padding_does_not_count() -> None:
    model = lively("bert")
    ids = inputs_for("bert")
    padded = torch.cat([ids, torch.full((len(ids), 9), 3)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), 9, dtype=ids.dtype)], 1)
    plain = calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    got = calibrate(model, [{"input_ids": padded, "attention_mask": mask, "labels": padded}])
    assert got == pytest.approx(plain, rel=1e-5)
    assert calibrate(model, [padded]) != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("tokens", [12, 3])
@pytest.mark.parametrize("family", ["gemma3", "qwen3", "olmo2", "opt"])
def test_padding_does_not_count_in_norms_of_heads(family: str, tokens: int) -> None:
    """Padding does not count in norms of heads.

    Heads stand before tokens or behind them. With 3 tokens and 1 of padding there are as many as
    heads.
    """
    model, ids = lively(family), inputs_for(family, tokens=tokens)
    padded = torch.cat([ids, torch.full((len(ids), 1), 3)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), 1, dtype=ids.dtype)], 1)
    masked = [{"input_ids": padded, "attention_mask": mask}]
    plain = calibrate(model, [ids], quantile=0.5)
    assert calibrate(model, masked, quantile=0.5) == pytest.approx(plain, rel=1e-5)
    assert calibrate(model, [padded], quantile=0.5) != pytest.approx(plain, rel=1e-3)


def test_the_floor_is_a_quantile_of_what_the_norm_divides_by() -> None:
    model, ids = lively("gpt2"), inputs_for("gpt2")
    seen: list[torch.Tensor] = []
    slot = model.transformer.h[0].ln_1
    handle = slot.register_forward_pre_hook(lambda m, a: seen.append(a[0].double()))
    logits(model, ids)
    handle.remove()
    s = (seen[0].var(-1, correction=0) + slot.eps).sqrt().flatten()
    for quantile in (0.0, 0.05, 0.5, 1.0):
        want = torch.quantile(s, quantile, interpolation="lower")
        got = calibrate(model, ids, quantile=quantile)["transformer.h.0.ln_1"]
        assert got == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "bert", "gemma3", "olmo2", "qwen3", "opt"])
def test_in_turn_every_slot_sees_what_it_will_see(family: str) -> None:
    model, ids = lively(family), inputs_for(family)
    floors = calibrate(model, ids, quantile=0.5)
    retrofit(model, paper(norms="calibrated", norm_floors=floors, overrides=own_caps(model)))
    seen: dict[str, torch.Tensor] = {}

    def hook(slot: str, module: Any, args: Any) -> None:
        seen[slot] = root_mean_square(args[0].double(), module.facts).flatten()

    for slot in floors:
        model.get_submodule(slot).register_forward_pre_hook(partial(hook, slot))
    logits(model, ids)
    assert list(seen) == list(floors), "in running order"
    for slot, s in seen.items():
        assert floors[slot] == pytest.approx(float(s.sort().values[(len(s) - 1) // 2]), rel=1e-5), (
            slot
        )


def test_of_many_tokens_some_are_looked_at_and_the_smallest_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = lively("qwen3"), torch.randint(67, (8, 24))
    with torch.no_grad():
        first = model.model.layers[0].self_attn
        first.q_proj.weight[: first.head_dim] *= (
            0.01  # one head of several: a stride over heads would miss it
        )
    smallest, middle = (calibrate(model, ids, quantile=q) for q in (0.0, 0.5))
    monkeypatch.setattr(calibration, "_AT_MOST", 256)
    assert calibrate(model, ids, quantile=0.0) == smallest
    assert calibrate(model, ids, quantile=0.5) == pytest.approx(middle, rel=0.3)


def test_attention_sinks_do_no_harm() -> None:
    """Attention sinks do no harm.

    A token is far larger than all others, as in trained transformers. No one constant serves it and
    them, and a floor does.
    """
    model, ids = lively("bert"), inputs_for("bert")
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[0] *= 40
    before = logits(model, ids)
    floors = calibrate(model, ids, quantile=0.05)
    retrofit(model, paper(norms="calibrated", norm_floors=floors, overrides=own_caps(model)))
    assert float((logits(model, ids) - before).norm() / before.norm()) < 0.05


def test_bad_input() -> None:
    model, ids = tiny("gpt2"), inputs_for("gpt2")
    floors = calibrate(model, [ids])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    slot = next(iter(floors))
    cases: list[tuple[Any, type, str]] = [
        (
            lambda: retrofit(model, paper(norms="calibrated")),
            ConfigError,
            r"norm_floors=calibrate\(model, batches\)",
        ),
        (
            lambda: retrofit(model, paper(norms="calibrated", norm_floors={slot: 1.0})),
            ConfigError,
            "norm_floors lacks .* Its slots: transformer.h.0.ln_1",
        ),
        (
            lambda: retrofit(model, paper(norms="calibrated", norm_floors={**floors, "x": 1.0})),
            ConfigError,
            "'x', which is no norm slot",
        ),
        (
            lambda: paper(norms="keep", norm_floors=floors),
            ConfigError,
            "norms='calibrated'",
        ),
        (
            lambda: paper(norms="calibrated", norm_floors={slot: -1.0}),
            ConfigError,
            "from 1e-12",
        ),
        (
            lambda: paper(norms="calibrated", norm_floors={slot: math.inf}),
            ConfigError,
            "1e12",
        ),
        (
            lambda: paper(norms="calibrated", norm_floors=floors, logit_scale=3.0),
            ConfigError,
            "calibrated",
        ),
        (lambda: calibrate(model, []), ConfigError, "no batches"),
        (lambda: calibrate(model, [[1, 2, 3]]), ConfigError, "a batch is a list"),
        (
            lambda: calibrate(
                model, [{"input_ids": ids, "attention_mask": torch.ones(2, 1, 12, 12)}]
            ),
            ConfigError,
            r"attention_mask has shape \(2, 1, 12, 12\)",
        ),
        (lambda: calibrate(model, [ids], quantile=1.5), ConfigError, r"in \[0, 1\]"),
        (lambda: calibrate(model, [ids[:0]]), ConfigError, "a batch is empty"),
        (
            lambda: calibrate(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}]),
            ConfigError,
            "no token of the batches counts",
        ),
        (lambda: calibrate(nn.Linear(2, 2), [ids]), UnsupportedModelError, "No architecture"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    gone = tiny("gpt2")
    retrofit(gone, paper())
    with pytest.raises(UnsupportedModelError, match="replaced already"):
        calibrate(gone, [ids])
    release(gone)
    with pytest.raises(ConfigError, match="are gone"):
        retrofit(gone, paper(norms="calibrated", norm_floors=floors))
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = math.inf
    with pytest.raises(NonFiniteError, match="ln_1 reads nan or inf"):
        calibrate(model, [ids])
    assert [type(m) for m in model.modules()] == classes
