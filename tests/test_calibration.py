"""norms="calibrated": what a norm was on average, certified, saved, and blended with the norm itself."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, HF_FAMILIES, auto_class, inputs_for, tiny
from torch import nn

from lip_plugin import (
    LipschitzConfig,
    calibrate,
    certify,
    drift,
    falsify,
    forward_rounding_upper,
    own_caps,
    release,
    retrofit,
    set_norm_shares_,
)
from lip_plugin.architecture import find_family
from lip_plugin.calibration import METHODS, _scale
from lip_plugin.certificate.build import build
from lip_plugin.certificate.compare import check_graph
from lip_plugin.errors import ConfigError, NonFiniteError, UnsupportedModelError
from lip_plugin.integrations.nanogpt import run
from lip_plugin.integrations.nanogpt_checkpoint import load_nanogpt
from lip_plugin.modules import constrained_modules
from lip_plugin.optim.projection import block_norms, keep_within_caps_
from lip_plugin.slots import Calibrated

# of random models some slots see tokens of very different sizes
pytestmark = pytest.mark.filterwarnings("ignore:calibrate. at")


def logits(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return find_family(model).logits(model.eval(), inputs)


def lively(family: str, **overrides: Any) -> Any:
    """Gains and biases that are not ones and zeros, output maps that are not zero."""
    model = tiny(family, **overrides)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(
                0.2
                * torch.randn(p.shape, generator=generator)
                / math.sqrt(max(1, p.shape[-1] if p.dim() > 1 else 1))
            )
    return model


def calibrated(family: str, shares: float | dict[str, float] = 0.0, **overrides: Any) -> Any:
    model = lively(family, **overrides)
    scales = calibrate(model, [inputs_for(family)])
    wanted = dict.fromkeys(scales, shares) if isinstance(shares, float) else shares
    retrofit(
        model,
        LipschitzConfig(
            norms="calibrated", norm_scales=scales, norm_shares=wanted, overrides=own_caps(model)
        ),
    )
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_own_caps_and_a_whole_norm_change_nothing(family: str) -> None:
    model, inputs = lively(family), inputs_for(family)
    before, weights = logits(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    scales = calibrate(model, [inputs])
    assert torch.equal(before, logits(model, inputs)), "calibrate leaves the model as it was"
    assert not any(m._forward_pre_hooks for m in model.modules())
    config = LipschitzConfig(norms="calibrated", norm_scales=scales, norm_shares=dict.fromkeys(scales, 1.0))
    retrofit(model, LipschitzConfig.from_json(config.to_json()))
    assert all(scale > 0 for scale in scales.values())
    assert torch.equal(before, logits(model, inputs))
    assert {k for k in model.state_dict() if not k.startswith("lm_head")} >= {
        k for k in weights if not k.startswith("lm_head")
    }


@pytest.mark.parametrize("method", ["soft_cap", "hard_cap", "spectral_normalize"])
@pytest.mark.parametrize("family", FAMILIES)
def test_caps_at_a_models_own_norms_change_no_bit(family: str, method: str) -> None:
    model = lively(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    retrofit(model, LipschitzConfig(norms="keep", method=method, overrides=own_caps(model)))
    keep_within_caps_(model)
    now = dict(model.named_parameters())  # an untied head is one more
    assert all(torch.equal(old, now[name]) for name, old in before.items())
    assert max(b.worst_over_cap for b in block_norms(model)) <= 1 + 1e-6


# a blend holds both rules; the affine map alone on all families is slow
QUICK = ("gpt2", "llama", "gemma3", "bert")
BLENDS = [(f, 0.3) for f in FAMILIES] + [(f, 0.0) for f in QUICK]
SLOW = [pytest.param(f, 0.0, marks=pytest.mark.slow) for f in FAMILIES if f not in QUICK]


@pytest.mark.parametrize(("family", "share"), [*BLENDS, *SLOW])
def test_the_graph_is_the_model_and_no_attack_exceeds_the_certificate(family: str, share: float) -> None:
    model = calibrated(family, share, num_hidden_layers=1).double()
    assert check_graph(build(model)) <= 1e-4
    found, attack = certify(model), falsify(model, restarts=1, steps=2, tokens=4)
    assert math.log10(attack.lower_bound) <= found.log10_lipschitz
    assert math.isfinite(certify(model, "caps").log10_lipschitz)
    if family not in QUICK and share:
        return  # drift too is slow
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            if p.dim() < 3:
                p.mul_(1.001)
    apart = drift(model, other, restarts=2, steps=4)
    assert 0 < apart.logit_lower <= apart.logit_upper


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "bert"])
def test_rounding_of_a_calibrated_model_is_within_its_bound(family: str) -> None:
    for share in (0.0, 0.5):
        model = calibrated(family, share, num_hidden_layers=1)
        inputs = inputs_for(family)
        exact = logits(copy.deepcopy(model).double(), inputs)
        off = (logits(model, inputs).double() - exact).square().mean(-1).sqrt().max()
        assert float(off) <= forward_rounding_upper(model, torch.float32, inputs.shape[1])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "olmo2", "bert", "gpt_neox", "opt", "nanogpt"])
def test_calibrated_norms_are_nearer_to_the_model_than_none(family: str) -> None:
    if family not in FAMILIES:
        pytest.skip("no stand-in")
    model, inputs = lively(family), inputs_for(family)
    before = logits(model, inputs)
    scales = calibrate(model, [inputs])
    off = []
    for chosen in (scales, dict.fromkeys(scales, 1.0)):
        twin = copy.deepcopy(model)
        retrofit(twin, LipschitzConfig(norms="calibrated", norm_scales=chosen, overrides=own_caps(twin)))
        off.append(float((logits(twin, inputs) - before).norm() / before.norm()))
    assert off[0] < 0.8 * off[1]


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("family", HF_FAMILIES)
def test_saving_and_loading_gives_the_very_same_logits(family: str, share: float, tmp_path: Any) -> None:
    model, inputs = calibrated(family, share), inputs_for(family)
    model.save_pretrained(tmp_path)
    again = auto_class(family).from_pretrained(tmp_path)
    assert torch.equal(logits(model, inputs), logits(again, inputs))
    assert again.lip_retrofit.config == model.lip_retrofit.config
    gains = [
        m.weight
        for m in again.modules()
        if isinstance(m, Calibrated) and getattr(m, "weight", None) is not None
    ]
    assert not any(g.requires_grad for g in gains)
    assert certify(again).log10_lipschitz == pytest.approx(certify(model).log10_lipschitz)


@pytest.mark.parametrize("family", [f for f in HF_FAMILIES if f != "vit" and not f.startswith("bert")])
def test_generating_with_and_without_a_cache_gives_the_same(family: str) -> None:
    model = calibrated(family, 0.3)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 1,
        "eos_token_id": None,
    }
    options |= {"return_dict_in_generate": True, "output_logits": True}
    ids = inputs_for(family)
    found = [model.generate(ids, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for a, b in zip(found[0].logits, found[1].logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_nanogpt_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    if "nanogpt" not in FAMILIES:
        pytest.skip("no stand-in")
    from test_nanogpt import checkout

    folder = checkout(tmp_path / "repo")
    scales = {"transformer.ln_f": 0.5} | {
        f"transformer.h.{i}.ln_{j}": 0.7 + 0.1 * i + j / 7 for i in range(2) for j in (1, 2)
    }
    options = {"norms": "calibrated", "norm_scales": scales, "norm_shares": {"transformer.h.0.ln_1": 0.25}}
    trained = run(folder, ["--max_iters=2", "--eval_interval=2"], options)["raw_model"]
    again = load_nanogpt(folder / "out", folder)
    trained.load_state_dict(torch.load(folder / "out" / "ckpt.pt")["model"])  # it took a step more
    ids = inputs_for("nanogpt") % 20
    assert torch.equal(logits(trained, ids), logits(again, ids))
    resumed = run(folder, ["--init_from=resume", "--max_iters=0"])["raw_model"]
    for model in (again, resumed):
        assert model.lip_retrofit.config == trained.lip_retrofit.config


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_half_precision_computes_inside_as_norms_do(family: str) -> None:
    for share in (0.0, 0.5):
        model = calibrated(family, share)
        slots = [m for m in model.modules() if isinstance(m, Calibrated)]
        for slot in slots:
            x = torch.randn(3, 5, slot.weight.shape[-1]) + 10.0  # a large mean, which bfloat16 would lose
            exact = copy.deepcopy(slot).double()(x.bfloat16().double())
            got = slot.bfloat16()(x.bfloat16())
            assert got.dtype == torch.bfloat16
            assert (got.double() - exact).abs().max() <= 2**-6 * exact.abs().max()


def test_without_the_plugin_a_calibrated_model_is_not_loaded_as_another(tmp_path: Any) -> None:
    model = calibrated("gpt2")
    assert model.config.activation_function == "lip_plugin.calibrated:gelu_new"
    from transformers.activations import ACT2FN

    assert type(ACT2FN["lip_plugin.calibrated:gelu_new"]) is type(ACT2FN["gelu_new"])
    with pytest.raises(KeyError):
        ACT2FN["lip_plugin.unknown:gelu_new"]


def test_pickle_copy_release_and_another_retrofit() -> None:
    model, inputs = calibrated("gpt2", 0.25), inputs_for("gpt2")
    before = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(before, logits(twin, inputs))
    config = model.lip_retrofit.config
    release(model)
    assert torch.equal(before, logits(model, inputs))
    with pytest.raises(ConfigError, match="norm_shares of 1"):
        retrofit(model, LipschitzConfig(norms="keep"))
    retrofit(model, LipschitzConfig.from_dict({**config.to_dict(), "norm_shares": {}}))
    assert not torch.equal(before, logits(model, inputs))
    retrofit(model, model.lip_retrofit.config)  # again: nothing


def test_gains_are_fixed_and_the_rest_trains() -> None:
    model = calibrated("gpt2", 0.5)
    ids = inputs_for("gpt2")
    model(input_ids=ids, labels=ids).loss.backward()
    for name, module in model.named_modules():
        if isinstance(module, Calibrated):
            assert module.weight.grad is None, name
            assert module.bias.grad.abs().sum() > 0, name
    assert all(m.weight.grad is not None for _, m in constrained_modules(model))
    assert "no cap" in " ".join(certify(model, "caps").assumptions)  # biases


def test_shares_change_in_mid_run_everywhere(tmp_path: Any) -> None:
    model, inputs = calibrated("llama", 1.0), inputs_for("llama")
    whole = logits(model, inputs)
    slots = list(model.lip_retrofit.config.norm_scales)
    report = set_norm_shares_(model, {slots[0]: 0.5})
    assert len(report) == len(slots)
    assert len(set_norm_shares_(model, {slots[0]: 0.5})) == 0
    assert model.lip_retrofit.config.norm_shares == {slots[0]: 0.5}
    half = logits(model, inputs)
    assert not torch.equal(whole, half)
    model.save_pretrained(tmp_path)
    assert torch.equal(half, logits(auto_class("llama").from_pretrained(tmp_path), inputs))
    before = copy.deepcopy(model.lip_retrofit.config)
    for wrong in ({slots[0]: 1.5}, {"nothing": 0.5}):
        with pytest.raises(ConfigError):
            set_norm_shares_(model, wrong)
    assert model.lip_retrofit.config == before
    kept = tiny("llama")
    retrofit(kept, LipschitzConfig(norms="keep"))
    with pytest.raises(ConfigError, match="'keep', not 'calibrated'"):
        set_norm_shares_(kept, {})


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
@pytest.mark.parametrize("family", ["gemma3", "qwen3", "olmo2"])
def test_padding_does_not_count_in_norms_of_heads(family: str, tokens: int) -> None:
    """Heads before tokens or behind them; with 3 tokens and 1 of padding there are as many as heads."""
    model, ids = lively(family), inputs_for(family, tokens=tokens)
    padded = torch.cat([ids, torch.full((len(ids), 1), 3)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), 1, dtype=ids.dtype)], 1)
    masked = [{"input_ids": padded, "attention_mask": mask}]
    plain = calibrate(model, [ids], method="mean_inverse")
    assert calibrate(model, masked, method="mean_inverse") == pytest.approx(plain, rel=1e-5)
    assert calibrate(model, [padded], method="mean_inverse") != pytest.approx(plain, rel=1e-3)


def test_the_constants_are_what_their_methods_say() -> None:
    model, ids = lively("gpt2"), inputs_for("gpt2")
    seen: list[torch.Tensor] = []
    slot = model.transformer.h[0].ln_1
    handle = slot.register_forward_pre_hook(lambda m, a: seen.append(a[0].double()))
    logits(model, ids)
    handle.remove()
    s = (seen[0].var(-1, correction=0) + slot.eps).sqrt().flatten()
    want = {
        "mean_inverse": (1 / s).mean(),
        "least_squares": s.sum() / s.square().sum(),
        "median": (1 / s).sort()[0][len(s) // 2],
        "least_absolute": min((1 / s).tolist(), key=lambda c: float((1 - c * s).abs().sum())),
    }
    for method, value in want.items():
        got = calibrate(model, ids, method=method)["transformer.h.0.ln_1"]
        assert got == pytest.approx(float(value), rel=0.05 if method == "median" else 1e-5)


def test_a_token_of_huge_activations_does_not_rule() -> None:
    """As language models have them at their first token."""
    s = torch.cat([torch.linspace(0.9, 1.1, 499, dtype=torch.float64), torch.tensor([60.0])])
    assert _scale("slot", s, "least_absolute")[0] == pytest.approx(1.0, abs=0.05)
    assert _scale("slot", s, "least_squares")[0] < 0.2
    tiny_too = torch.cat([s, torch.full((1,), 1e-4)])
    assert _scale("slot", tiny_too, "least_absolute")[0] == pytest.approx(1.0, abs=0.05)
    assert _scale("slot", tiny_too, "mean_inverse")[0] > 10


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_what_the_best_constant_leaves(method: str) -> None:
    s = torch.rand(101, dtype=torch.float64) ** 3 + 0.01
    tried = torch.linspace(0.0, 5.0, 200_001, dtype=torch.float64)
    least = min(float((1.0 - c * s).square().mean()) for c in tried[::100])
    near = _scale("slot", s, "least_squares")[0]
    finer = (
        (1.0 - (near + torch.linspace(-0.01, 0.01, 2001, dtype=torch.float64))[:, None] * s).square().mean(1)
    )
    assert _scale("slot", s, method)[1] == pytest.approx(float(finer.min()), abs=1e-9)
    assert _scale("slot", s, method)[1] <= least
    assert _scale("slot", torch.full((9,), 0.1), method)[1] == pytest.approx(0.0, abs=1e-6)


def test_norms_that_no_constant_serves_are_named_and_may_stay() -> None:
    model, ids = lively("bert"), inputs_for("bert")
    with torch.no_grad():
        # an attention sink: the first token is far larger than all others
        model.bert.embeddings.position_embeddings.weight[0] *= 40
    before = logits(model, ids)
    first, config = "bert.embeddings.LayerNorm", {"norms": "calibrated", "overrides": own_caps(model)}
    with pytest.warns(UserWarning, match=rf"{first} \(0\.\d\d\).*error_max"):
        without = calibrate(model, ids)
    assert without.shares == {}
    found = calibrate(model, ids, error_max=0.2)  # no warning: they are errors here
    assert found.shares == {slot: 1.0 for slot, error in found.errors.items() if error > 0.2}
    assert first in found.shares
    assert len(found.shares) < len(found)
    assert found == calibrate(model, ids, norm_shares=found.shares), "later slots see the norms that stay"
    off = []
    for scales in (found, without):
        twin = copy.deepcopy(model)
        retrofit(twin, LipschitzConfig(norm_scales=scales, norm_shares=scales.shares, **config))
        off.append(float((logits(twin, ids) - before).norm() / before.norm()))
    assert off[0] < 0.5 * off[1], off
    with pytest.raises(ConfigError, match=r"bert\.ln_g.*no such slot"):
        calibrate(model, ids, norm_shares={"bert.ln_g": 0.5})


def test_bad_input() -> None:
    model, ids = tiny("gpt2"), inputs_for("gpt2")
    scales = calibrate(model, [ids])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    slot = next(iter(scales))
    cases: list[tuple[Any, type, str]] = [
        (
            lambda: retrofit(model, LipschitzConfig(norms="calibrated")),
            ConfigError,
            r"norm_scales=calibrate\(model, batches\)",
        ),
        (
            lambda: retrofit(model, LipschitzConfig(norms="calibrated", norm_scales={slot: 1.0})),
            ConfigError,
            "norm_scales lacks .* Its slots: transformer.h.0.ln_1",
        ),
        (
            lambda: retrofit(model, LipschitzConfig(norms="calibrated", norm_scales={**scales, "x": 1.0})),
            ConfigError,
            "'x', which is no norm slot",
        ),
        (lambda: LipschitzConfig(norms="keep", norm_scales=scales), ConfigError, "norms='calibrated'"),
        (lambda: LipschitzConfig(norms="calibrated", norm_scales={slot: 0.0}), ConfigError, "above 0"),
        (
            lambda: LipschitzConfig(norms="calibrated", norm_scales=scales, norm_shares={slot: -0.1}),
            ConfigError,
            r"lies in \[0, 1\]",
        ),
        (
            lambda: LipschitzConfig(norms="calibrated", norm_scales=scales, logit_scale=3.0),
            ConfigError,
            "calibrated",
        ),
        (lambda: calibrate(model, []), ConfigError, "no batches"),
        (lambda: calibrate(model, [[1, 2, 3]]), ConfigError, "a batch is a list"),
        (
            lambda: calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones(2, 1, 12, 12)}]),
            ConfigError,
            r"attention_mask has shape \(2, 1, 12, 12\)",
        ),
        (lambda: calibrate(model, [ids], method="mode"), ConfigError, "mean_inverse"),
        (lambda: calibrate(nn.Linear(2, 2), [ids]), UnsupportedModelError, "No architecture"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    gone = tiny("gpt2")
    retrofit(gone)
    with pytest.raises(UnsupportedModelError, match="replaced already"):
        calibrate(gone, [ids])
    release(gone)
    with pytest.raises(ConfigError, match="are gone"):
        retrofit(gone, LipschitzConfig(norms="calibrated", norm_scales=scales))
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = math.inf
    with pytest.raises(NonFiniteError, match="ln_1 reads nan or inf"):
        calibrate(model, [ids])
    assert [type(m) for m in model.modules()] == classes
