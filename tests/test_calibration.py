"""norms="calibrated": a floor under every norm: found on data, certified, saved, moved in mid-run."""

from __future__ import annotations

import copy
import math
import pickle
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, HF_FAMILIES, auto_class, inputs_for, tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lip_plugin import (
    LipschitzConfig,
    calibrate,
    calibration,
    certify,
    drift,
    falsify,
    forward_rounding_upper,
    own_caps,
    release,
    retrofit,
    set_norm_floors_,
)
from lip_plugin.architecture import find_family
from lip_plugin.certificate.build import build
from lip_plugin.certificate.compare import check_graph
from lip_plugin.certificate.graph import Norm, Norms
from lip_plugin.certificate.local import norm_rule
from lip_plugin.certificate.rounding import Arithmetic, rounding
from lip_plugin.errors import CertificateError, ConfigError, NonFiniteError, UnsupportedModelError
from lip_plugin.integrations.hf_checkpoint import certify_streamed
from lip_plugin.integrations.nanogpt import run
from lip_plugin.integrations.nanogpt_checkpoint import load_nanogpt
from lip_plugin.modules import constrained_modules
from lip_plugin.optim.projection import block_norms, keep_within_caps_
from lip_plugin.slots import Floored, floor_, root_mean_square


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


def calibrated(family: str, quantile: float = 0.5, times: float = 1.0, **overrides: Any) -> Any:
    """Floors at a quantile of what the norms divide by on the tests' inputs, times a number."""
    model = lively(family, **overrides)
    found = calibrate(model, [inputs_for(family)], quantile=quantile)
    floors = {slot: times * floor for slot, floor in found.items()}
    retrofit(model, LipschitzConfig(norms="calibrated", norm_floors=floors, overrides=own_caps(model)))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_own_caps_and_floors_of_zero_change_no_bit(family: str) -> None:
    model, inputs = lively(family), inputs_for(family)
    before, weights = logits(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    floors = calibrate(model, [inputs])
    assert torch.equal(before, logits(model, inputs)), "calibrate leaves the model as it was"
    assert not any(m._forward_pre_hooks for m in model.modules())
    config = LipschitzConfig(norms="calibrated", norm_floors=dict.fromkeys(floors, 0.0))
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
    retrofit(model, LipschitzConfig(norms="calibrated", norm_floors=floors, overrides=own))
    assert torch.equal(before, logits(model, inputs))
    retrofit(twin, LipschitzConfig(norms="keep", overrides=own))
    assert certify(model).log10_lipschitz < certify(twin).log10_lipschitz - 1


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


# a floor that half of the tokens are below; that none is below, or all are far below, on all families is slow
QUICK = ("gpt2", "llama", "gemma3", "bert")
ENDS = [(0.0, 1.0), (1.0, 4.0)]
MIDDLE = [(f, 0.5, 1.0) for f in FAMILIES] + [(f, *end) for f in QUICK for end in ENDS]
SLOW = [pytest.param(f, *end, marks=pytest.mark.slow) for f in FAMILIES if f not in QUICK for end in ENDS]


@pytest.mark.parametrize(("family", "quantile", "times"), [*MIDDLE, *SLOW])
def test_the_graph_is_the_model_and_no_attack_exceeds_the_certificate(
    family: str, quantile: float, times: float
) -> None:
    model = calibrated(family, quantile, times, num_hidden_layers=1).double()
    assert check_graph(build(model)) <= 1e-4
    found, attack = certify(model), falsify(model, restarts=1, steps=2, tokens=4)
    assert math.log10(attack.lower_bound) <= found.log10_lipschitz
    assert math.isfinite(certify(model, "caps").log10_lipschitz)
    if family not in QUICK:
        return  # drift too is slow
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            if p.dim() < 3:
                p.mul_(1.001)
    apart = drift(model, other, restarts=2, steps=4)
    assert 0 < apart.logit_lower <= apart.logit_upper


def _alone(kind: str, floor: float, width: int = 6) -> tuple[Any, Norm]:
    """A norm module with a floor, float64, and its node."""
    if kind == "LayerNorm":
        module: Any = nn.LayerNorm(width)
        nn.init.normal_(module.bias)
    else:
        module = LlamaRMSNorm(width)
    nn.init.normal_(module.weight)
    floor_(module.double().requires_grad_(False), "slot", floor)
    facts = module.facts
    node = Norm("slot", module, facts.eps, facts.center, module.weight, getattr(module, "bias", None), floor)
    return module, node


@pytest.mark.parametrize("floor", [1e-3, 0.3, 5.0])
@pytest.mark.parametrize("kind", ["LayerNorm", "LlamaRMSNorm"])
def test_a_norm_alone_is_within_its_rule_and_attains_it_below_the_floor(kind: str, floor: float) -> None:
    module, node = _alone(kind, floor)
    bound = float(node.bound(Decimal(7), Norms()).lipschitz)
    assert bound == pytest.approx(
        float(module.weight.abs().max()) / max(floor, module.facts.eps**0.5), rel=1e-9
    )
    worst = 0.0
    for size in (0.1, 0.5, 0.9, 0.99, 1.0, 1.01, 1.5, 10.0):  # around the kink as well
        x = torch.randn(400, 6, dtype=torch.float64)
        x = size * floor * x / x.square().mean(-1, keepdim=True).sqrt()
        y = x + torch.randn_like(x) * floor * torch.logspace(-6, 0.5, 400, dtype=torch.float64)[:, None]
        moved = (module(x) - module(y)).norm(dim=-1) / (x - y).norm(dim=-1)
        worst = max(worst, float(moved.max()))
        radius = node.bound(Decimal(float(x.square().mean(-1).sqrt().max()) * (1 + 1e-9)), Norms()).radius
        assert float(module(x).square().mean(-1).sqrt().max()) <= float(radius)
    assert worst <= bound * (1 + 1e-9)
    steep = torch.zeros(1, 6, dtype=torch.float64)
    steep[0, int(module.weight.abs().argmax())] = 1e-3 * floor
    attained = float(((module(steep) - module(-steep)).norm() / (2 * steep.norm())).detach())
    share = math.sqrt(5 / 6) if module.facts.center else 1.0  # centering takes the mean of the one entry
    assert attained >= 0.9 * share * bound if floor > 0.01 else attained <= bound
    # without the floor in the rule it would be seen to fail: what the rule for no floor says is larger, never smaller
    assert float(Norm(**{**node.__dict__, "floor": 0.0}).bound(Decimal(7), Norms()).lipschitz) >= bound
    wrong = Norm(**{**node.__dict__, "floor": 2 * floor}).bound(Decimal(7), Norms())
    assert float(wrong.lipschitz) < attained or floor < 0.01


@pytest.mark.parametrize("floor", [0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["LayerNorm", "LlamaRMSNorm"])
def test_a_norm_moves_and_bends_no_more_than_its_local_rule_says(kind: str, floor: float) -> None:
    module, node = _alone(kind, floor, width=5)
    run = module if kind == "LayerNorm" else node.run  # Llama's computes in float32
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 5, generator=generator, dtype=torch.float64) * (0.1 + 0.05 * seed)
        size = torch.tensor([0.003, 0.1, 0.5, 2.0], dtype=torch.float64)[:, None]
        moved, curved = norm_rule(node, x, size)
        jacobian = torch.autograd.functional.jacobian(lambda v: run(v[None])[0], x[0])
        for i, radius in enumerate(size[:, 0].tolist()):
            step = torch.randn(2000, 5, generator=generator, dtype=torch.float64)
            step = radius * step / step.norm(dim=-1, keepdim=True)
            change = run(x + step) - run(x)
            assert float(change.norm(dim=-1).max()) <= float(moved[i, 0]) * (1 + 1e-9)
            bent = (change - step @ jacobian.T).norm(dim=-1).max()
            assert float(bent) <= float(curved[i, 0]) * (1 + 1e-9) + 1e-12, (seed, radius)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "bert"])
def test_rounding_of_a_calibrated_model_is_within_its_bound(family: str) -> None:
    for quantile in (0.0, 0.5, 1.0):
        model = calibrated(family, quantile, num_hidden_layers=1)
        inputs = inputs_for(family)
        exact = logits(copy.deepcopy(model).double(), inputs)
        off = (logits(model, inputs).double() - exact).square().mean(-1).sqrt().max()
        assert float(off) <= forward_rounding_upper(model, torch.float32, inputs.shape[1])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "olmo2", "bert", "gpt_neox", "opt", "nanogpt"])
def test_lower_floors_are_nearer_to_the_model_and_higher_ones_prove_more(family: str) -> None:
    if family not in FAMILIES:
        pytest.skip("no stand-in")
    model, inputs = lively(family), inputs_for(family)
    before, off, proven = logits(model, inputs), [], []
    for quantile in (0.0, 0.3, 1.0):
        twin = copy.deepcopy(model)
        floors = calibrate(twin, [inputs], quantile=quantile)
        retrofit(twin, LipschitzConfig(norms="calibrated", norm_floors=floors, overrides=own_caps(twin)))
        off.append(float((logits(twin, inputs) - before).norm() / before.norm()))
        proven.append(certify(twin).log10_lipschitz)
    assert off[0] < 1e-4
    assert off[0] < off[1] < off[2]
    assert proven[0] > proven[1] > proven[2]


@pytest.mark.parametrize("quantile", [0.1, 0.8])
@pytest.mark.parametrize("family", HF_FAMILIES)
def test_saving_and_loading_gives_the_very_same_logits(family: str, quantile: float, tmp_path: Any) -> None:
    model, inputs = calibrated(family, quantile), inputs_for(family)
    model.save_pretrained(tmp_path)
    again = auto_class(family).from_pretrained(tmp_path)
    assert torch.equal(logits(model, inputs), logits(again, inputs))
    assert again.lip_retrofit.config == model.lip_retrofit.config
    gains = [
        m.weight for m in again.modules() if isinstance(m, Floored) and getattr(m, "weight", None) is not None
    ]
    assert not any(g.requires_grad for g in gains)
    assert certify(again).log10_lipschitz == pytest.approx(certify(model).log10_lipschitz)


@pytest.mark.parametrize("family", [f for f in HF_FAMILIES if f != "vit" and not f.startswith("bert")])
def test_generating_with_and_without_a_cache_gives_the_same(family: str) -> None:
    model = calibrated(family)
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
    floors = {"transformer.ln_f": 0.5} | {
        f"transformer.h.{i}.ln_{j}": 0.7 + 0.1 * i + j / 7 for i in range(2) for j in (1, 2)
    }
    options = {"norms": "calibrated", "norm_floors": floors | {"transformer.h.0.ln_1": 0.0}}
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
    for quantile in (0.0, 1.0):
        model = calibrated(family, quantile, times=2.0)
        slots = [m for m in model.modules() if isinstance(m, Floored)]
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
    model, inputs = calibrated("gpt2"), inputs_for("gpt2")
    before = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(before, logits(twin, inputs))
    config = model.lip_retrofit.config
    release(model)
    assert torch.equal(before, logits(model, inputs))
    with pytest.raises(ConfigError, match="norm_floors of 0"):
        retrofit(model, LipschitzConfig(norms="keep"))
    higher = {slot: 2 * floor for slot, floor in config.norm_floors.items()}
    retrofit(model, LipschitzConfig.from_dict({**config.to_dict(), "norm_floors": higher}))
    assert not torch.equal(before, logits(model, inputs))
    retrofit(model, model.lip_retrofit.config)  # again: nothing


def test_gains_are_fixed_and_the_rest_trains() -> None:
    model = calibrated("gpt2")
    ids = inputs_for("gpt2")
    model(input_ids=ids, labels=ids).loss.backward()
    for name, module in model.named_modules():
        if isinstance(module, Floored):
            assert module.weight.grad is None, name
            assert module.bias.grad.abs().sum() > 0, name
    assert all(m.weight.grad is not None for _, m in constrained_modules(model))
    assert "no cap" in " ".join(certify(model, "caps").assumptions)  # biases


def test_floors_move_in_mid_run_everywhere(tmp_path: Any) -> None:
    model, inputs = calibrated("llama", times=0.0), inputs_for("llama")
    whole = logits(model, inputs)
    slots = list(model.lip_retrofit.config.norm_floors)
    report = set_norm_floors_(model, {slots[0]: 5.0})
    assert len(report) == 1
    assert len(set_norm_floors_(model, {slots[0]: 5.0})) == 0
    assert model.lip_retrofit.config.norm_floors == dict.fromkeys(slots, 0.0) | {slots[0]: 5.0}
    half = logits(model, inputs)
    assert not torch.equal(whole, half)
    model.save_pretrained(tmp_path)
    assert torch.equal(half, logits(auto_class("llama").from_pretrained(tmp_path), inputs))
    before = copy.deepcopy(model.lip_retrofit.config)
    for wrong in ({slots[0]: -1.5}, {"nothing": 0.5}, {slots[0]: math.inf}, {slots[0]: math.nan}):
        with pytest.raises(ConfigError):
            set_norm_floors_(model, wrong)
    assert model.lip_retrofit.config == before
    kept = tiny("llama")
    retrofit(kept, LipschitzConfig(norms="keep"))
    with pytest.raises(ConfigError, match="'keep', not 'calibrated'"):
        set_norm_floors_(kept, {})


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
    """Heads before tokens or behind them; with 3 tokens and 1 of padding there are as many as heads."""
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
    retrofit(model, LipschitzConfig(norms="calibrated", norm_floors=floors, overrides=own_caps(model)))
    seen: dict[str, torch.Tensor] = {}

    def hook(slot: str, module: Any, args: Any) -> None:
        seen[slot] = root_mean_square(args[0].double(), module.facts).flatten()

    for slot in floors:
        model.get_submodule(slot).register_forward_pre_hook(partial(hook, slot))
    logits(model, ids)
    assert list(seen) == list(floors), "in running order"
    for slot, s in seen.items():
        assert floors[slot] == pytest.approx(float(s.sort().values[(len(s) - 1) // 2]), rel=1e-5), slot


def test_of_many_tokens_some_are_looked_at_and_the_smallest_always(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_released_model_keeps_its_floors_and_no_certificate_of_another() -> None:
    models = [calibrated("gpt2", times=times) for times in (20.0, 0.0)]
    for model in models:
        release(model)
    stated = certify(models[0])
    stated.verify(models[0])
    for certificate, other in ((stated, models[1]), (certify(models[1]), models[0])):
        with pytest.raises(CertificateError, match="floors"):
            certificate.verify(other)


def test_a_norm_with_a_forward_of_its_own_is_refused() -> None:
    model, ids = lively("gpt2"), inputs_for("gpt2")
    floors = calibrate(model, ids)
    slot = model.transformer.ln_f
    slot.forward = slot.forward  # as accelerate's hooks do
    with pytest.raises(UnsupportedModelError, match="ln_f carries a forward of its own"):
        retrofit(model, LipschitzConfig(norms="calibrated", norm_floors=floors))
    assert not hasattr(model, "lip_retrofit")
    del slot.forward
    retrofit(model, LipschitzConfig(norms="calibrated", norm_floors=floors))
    before, state = logits(model, ids), copy.deepcopy(model.lip_retrofit.config)
    slot.forward = slot.forward
    with pytest.raises(UnsupportedModelError, match="carries a forward"):
        set_norm_floors_(model, dict.fromkeys(floors, 9.0))
    del slot.forward
    assert torch.equal(before, logits(model, ids))
    assert model.lip_retrofit.config == state


def test_norms_that_peft_wrapped_are_not_half_changed() -> None:
    model = calibrated("llama")
    floors, ids = model.lip_retrofit.config.norm_floors, inputs_for("llama")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"]))
    before = logits(model, ids)
    with pytest.raises(ConfigError, match="wrapped by a ModulesToSaveWrapper"):
        set_norm_floors_(adapted, dict.fromkeys(floors, 9.0))
    assert torch.equal(before, logits(model, ids))


@pytest.mark.parametrize("floor", [1e-5, 1e-3, 1e3, 1e4])
def test_float16_gains_over_floors_neither_overflow_nor_vanish(floor: float) -> None:
    module, _ = _alone("LayerNorm", floor, width=8)
    with torch.no_grad():
        module.weight.fill_(2.0 if floor < 1 else 1e-3)
        module.bias.zero_()
    module.half()
    size = floor * torch.logspace(-2, 2 if floor < 1 else 0.2, 64)[:, None]  # on both sides, within float16
    x = (torch.randn(64, 8) * size).half().float().requires_grad_(True)
    y = module(x.half())
    exact = copy.deepcopy(module).double()(x.detach().half().double())
    assert torch.isfinite(y).all()
    assert (y.double() - exact).abs().max() <= 2**-9 * exact.abs().max() + 2**-24
    y.float().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_rounding_of_a_norm_without_a_gain_is_within_its_bound() -> None:
    """Its width is not in a weight; a large mean is what costs."""
    for width in (64, 4096):
        module = nn.LayerNorm(width, elementwise_affine=False)
        floor_(module, "slot", 0.5)
        node = Norm("slot", module, module.eps, True, None, None, 0.5)
        x = torch.linspace(-1, 1, width)[None] + 1e4
        off = float((module(x).double() - node.run(x.double())).square().mean().sqrt())
        size = Decimal(float(x.double().square().mean().sqrt())) * Decimal("1.000001")
        assert off > 0
        assert off <= float(rounding(node, size, Decimal(0), Norms(), Arithmetic.of(torch.float32, 1)))


def test_a_streamed_certificate_of_more_layers_than_its_twin(tmp_path: Path) -> None:
    model = calibrated("llama", num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    streamed = certify_streamed(tmp_path)
    assert streamed.log10_lipschitz == pytest.approx(certify(model).log10_lipschitz)
    streamed.verify(model)


def test_attention_sinks_do_no_harm() -> None:
    """A token far larger than all others, as trained transformers have: no one constant serves it and them, a floor does."""
    model, ids = lively("bert"), inputs_for("bert")
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[0] *= 40
    before = logits(model, ids)
    floors = calibrate(model, ids, quantile=0.05)
    retrofit(model, LipschitzConfig(norms="calibrated", norm_floors=floors, overrides=own_caps(model)))
    assert float((logits(model, ids) - before).norm() / before.norm()) < 0.05


def test_bad_input() -> None:
    model, ids = tiny("gpt2"), inputs_for("gpt2")
    floors = calibrate(model, [ids])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    slot = next(iter(floors))
    cases: list[tuple[Any, type, str]] = [
        (
            lambda: retrofit(model, LipschitzConfig(norms="calibrated")),
            ConfigError,
            r"norm_floors=calibrate\(model, batches\)",
        ),
        (
            lambda: retrofit(model, LipschitzConfig(norms="calibrated", norm_floors={slot: 1.0})),
            ConfigError,
            "norm_floors lacks .* Its slots: transformer.h.0.ln_1",
        ),
        (
            lambda: retrofit(model, LipschitzConfig(norms="calibrated", norm_floors={**floors, "x": 1.0})),
            ConfigError,
            "'x', which is no norm slot",
        ),
        (lambda: LipschitzConfig(norms="keep", norm_floors=floors), ConfigError, "norms='calibrated'"),
        (lambda: LipschitzConfig(norms="calibrated", norm_floors={slot: -1.0}), ConfigError, "from 1e-12"),
        (lambda: LipschitzConfig(norms="calibrated", norm_floors={slot: math.inf}), ConfigError, "1e12"),
        (
            lambda: LipschitzConfig(norms="calibrated", norm_floors=floors, logit_scale=3.0),
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
    retrofit(gone)
    with pytest.raises(UnsupportedModelError, match="replaced already"):
        calibrate(gone, [ids])
    release(gone)
    with pytest.raises(ConfigError, match="are gone"):
        retrofit(gone, LipschitzConfig(norms="calibrated", norm_floors=floors))
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = math.inf
    with pytest.raises(NonFiniteError, match="ln_1 reads nan or inf"):
        calibrate(model, [ids])
    assert [type(m) for m in model.modules()] == classes
