"""Models with floors under their norms can be saved, released, wrapped and changed.

They generate text, and change in mid-run.
"""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lip_plugin import (
    LipschitzConfig,
    attach_projection,
    calibrate,
    certify,
    config_of,
    drift,
    falsify,
    release,
    retrofit,
    set_norm_floors_,
)
from lip_plugin.errors import CertificateError, ConfigError, UnsupportedModelError
from lip_plugin.integrations.huggingface.loading import certify_streamed
from lip_plugin.integrations.nanogpt.checkpoint import load_nanogpt
from lip_plugin.integrations.nanogpt.run import run
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.normalization import Floored
from lip_plugin.model.saved_names import CALIBRATED, CALIBRATED_NAMES
from tests.support.families import DECODERS, FAMILIES, HF_FAMILIES, auto_class, inputs_for, tiny
from tests.support.oracles import paper
from tests.support.peft_models import TARGETS, TOLERANCE, disturb, trainable, worst_merged
from tests.support.pretrained_models import calibrated, lively, logits


@pytest.mark.parametrize("quantile", [0.1, 0.8])
@pytest.mark.parametrize("family", HF_FAMILIES)
def test_saving_and_loading_gives_the_very_same_logits(
    family: str, quantile: float, tmp_path: Any
) -> None:
    model, inputs = calibrated(family, quantile), inputs_for(family)
    model.save_pretrained(tmp_path)
    again = auto_class(family).from_pretrained(tmp_path)
    assert torch.equal(logits(model, inputs), logits(again, inputs))
    assert config_of(again) == config_of(model)
    gains = [
        m.weight
        for m in again.modules()
        if isinstance(m, Floored) and getattr(m, "weight", None) is not None
    ]
    assert not any(g.requires_grad for g in gains)
    assert certify(again).log10_lipschitz == pytest.approx(certify(model).log10_lipschitz)


@pytest.mark.parametrize("family", DECODERS)
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
    from tests.integrations.test_nanogpt import checkout

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
        assert config_of(model) == config_of(trained)


def test_without_the_plugin_a_calibrated_model_is_not_loaded_as_another(tmp_path: Any) -> None:
    model = calibrated("gpt2")
    assert model.config.activation_function == CALIBRATED + "gelu_new"
    from transformers.activations import ACT2FN

    for prefix in CALIBRATED_NAMES:
        assert type(ACT2FN[prefix + "gelu_new"]) is type(ACT2FN["gelu_new"])
    with pytest.raises(KeyError):
        ACT2FN["lip_plugin.unknown:gelu_new"]


def test_pickle_copy_release_and_another_retrofit() -> None:
    model, inputs = calibrated("gpt2"), inputs_for("gpt2")
    before = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(before, logits(twin, inputs))
    config = config_of(model)
    release(model)
    assert torch.equal(before, logits(model, inputs))
    with pytest.raises(ConfigError, match="norm_floors of 0"):
        retrofit(model, paper(norms="keep"))
    higher = {slot: 2 * floor for slot, floor in config.norm_floors.items()}
    retrofit(model, LipschitzConfig.from_dict({**config.to_dict(), "norm_floors": higher}))
    assert not torch.equal(before, logits(model, inputs))
    retrofit(model, config_of(model))  # again: nothing


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
    slots = list(config_of(model).norm_floors)
    report = set_norm_floors_(model, {slots[0]: 5.0})
    assert len(report) == 1
    assert len(set_norm_floors_(model, {slots[0]: 5.0})) == 0
    assert config_of(model).norm_floors == dict.fromkeys(slots, 0.0) | {slots[0]: 5.0}
    half = logits(model, inputs)
    assert not torch.equal(whole, half)
    model.save_pretrained(tmp_path)
    assert torch.equal(half, logits(auto_class("llama").from_pretrained(tmp_path), inputs))
    before = copy.deepcopy(config_of(model))
    for wrong in ({slots[0]: -1.5}, {"nothing": 0.5}, {slots[0]: math.inf}, {slots[0]: math.nan}):
        with pytest.raises(ConfigError):
            set_norm_floors_(model, wrong)
    assert config_of(model) == before
    kept = tiny("llama")
    retrofit(kept, paper(norms="keep"))
    with pytest.raises(ConfigError, match="'keep', not 'calibrated'"):
        set_norm_floors_(kept, {})


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
        retrofit(model, paper(norms="calibrated", norm_floors=floors))
    assert not hasattr(model, "lip_retrofit")
    del slot.forward
    retrofit(model, paper(norms="calibrated", norm_floors=floors))
    before, state = logits(model, ids), copy.deepcopy(config_of(model))
    slot.forward = slot.forward
    with pytest.raises(UnsupportedModelError, match="carries a forward"):
        set_norm_floors_(model, dict.fromkeys(floors, 9.0))
    del slot.forward
    assert torch.equal(before, logits(model, ids))
    assert config_of(model) == state


def test_norms_that_peft_wrapped_are_not_half_changed() -> None:
    model = calibrated("llama")
    floors, ids = config_of(model).norm_floors, inputs_for("llama")
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"])
    )
    before = logits(model, ids)
    with pytest.raises(ConfigError, match="wrapped by a ModulesToSaveWrapper"):
        set_norm_floors_(adapted, dict.fromkeys(floors, 9.0))
    assert torch.equal(before, logits(model, ids))


def test_a_streamed_certificate_of_more_layers_than_its_twin(tmp_path: Path) -> None:
    model = calibrated("llama", num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    streamed = certify_streamed(tmp_path)
    assert streamed.log10_lipschitz == pytest.approx(certify(model).log10_lipschitz)
    streamed.verify(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_on_a_model_with_floors_stay_within_caps_and_are_certified(family: str) -> None:
    model, ids = calibrated(family), inputs_for(family)
    targets: Any = TARGETS[family]
    adapted: Any = get_peft_model(
        model, LoraConfig(r=4, target_modules=targets, fan_in_fan_out=family == "gpt2")
    )
    disturb(adapted, 0.2)
    optimizer = torch.optim.AdamW(trainable(adapted), lr=0.01)
    attach_projection(optimizer, adapted)
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert worst_merged(adapted) <= 1 + TOLERANCE
    moved = drift(adapted, restarts=2, steps=5)
    assert 0 < moved.logit_lower <= moved.logit_upper
    before = certify(adapted).log10_lipschitz
    set_norm_floors_(adapted, {k: 2 * v for k, v in config_of(model).norm_floors.items()})
    assert certify(adapted).log10_lipschitz < before
    merged = adapted.merge_and_unload()
    assert certify(merged).log10_lipschitz == pytest.approx(
        certify(adapted).log10_lipschitz, abs=1e-6
    )
    assert falsify(merged, restarts=1, steps=2, tokens=4).lower_bound <= certify(merged).lipschitz
