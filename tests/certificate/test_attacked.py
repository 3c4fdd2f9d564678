"""What an independent attack found: each is refused now, or certified for what really runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lip_plugin import (
    activation_report,
    attacked_accuracy,
    certified_accuracy,
    certified_radius,
    certify,
    drift,
    forward_rounding_upper,
)
from lip_plugin.errors import CertificateError, ConfigError, LipschitzError, UnsupportedModelError
from tests.support.families import tiny
from tests.support.oracles import paper, random_model

LONG = {"max_position_embeddings": 128}


def about(model: Any, ids: torch.Tensor) -> list[Callable[[], Any]]:
    """Everything that says something about given inputs."""
    return [
        lambda: certified_radius(model, ids),
        lambda: certified_accuracy(model, [ids]),
        lambda: attacked_accuracy(model, [ids], restarts=1, steps=1),
        lambda: activation_report(model, ids),
    ]


@pytest.mark.parametrize("family", ["llama", "olmo2", "granite"])
def test_a_window_that_the_forward_does_not_read_is_not_in_the_graph(family: str) -> None:
    model = random_model(family, paper(residual=0.5), sliding_window=20, **LONG)
    ids = torch.randint(67, (2, 64))
    prediction = certified_radius(model, ids).prediction
    with torch.no_grad():
        assert torch.equal(prediction, model(ids).logits.argmax(-1))


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("place", ["config", "modules"])
def test_a_window_that_only_one_side_has_is_seen(family: str, place: str) -> None:
    model = random_model(family, paper(norms="keep"), sliding_window=20, **LONG)
    ids = torch.randint(67, (2, 64))
    assert certified_radius(model, ids).radius.shape == (2, 64)
    for holder in [model.config] if place == "config" else model.modules():
        if getattr(holder, "sliding_window", None):
            holder.sliding_window = 40
    for call in (lambda: certify(model), *about(model, ids)):
        with pytest.raises(CertificateError, match="reproduce"):
            call()


@pytest.mark.parametrize("start", [9, 20])
def test_positions_in_a_buffer_are_part_of_the_function(start: int) -> None:
    model = random_model("bert", paper(), **LONG)
    ids = torch.randint(10, 67, (1, 60))
    certificate = certify(model)
    assert certified_radius(model, ids).radius.shape == (1, 60)
    tuned = random_model("bert", paper(), **LONG)
    for changed in (model, tuned):
        changed.bert.embeddings.position_ids[:, start:] = 0
    calls = [lambda: certified_radius(model, ids), lambda: activation_report(model, ids)]
    for call in calls:
        with pytest.raises(CertificateError, match="reproduce"):
            call()
    with pytest.raises(CertificateError, match="position_ids|reproduce"):
        certificate.verify(model)
    with pytest.raises(LipschitzError):
        drift(random_model("bert", paper(), **LONG), tuned)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3"])
def test_a_drift_of_masks_is_no_drift_of_zero(family: str) -> None:
    pair = [random_model(family, paper(), sliding_window=20, **LONG) for _ in range(2)]
    pair[1].config.sliding_window = 30
    with pytest.raises(LipschitzError, match="sliding_window|reproduce"):
        drift(*pair, attack=False)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize(
    "place", ["transformer.wte", "transformer.h.0.attn.c_attn", "transformer.ln_f"]
)
def test_what_is_computed_before_a_forward_is_refused_and_left_alone(place: str, leaf: str) -> None:
    model = random_model("gpt2", paper(norms="keep"))
    module = model.get_submodule(place)
    if getattr(module, leaf, None) is None:
        pytest.skip("it has none")
    prune.identity(module, leaf)
    before = getattr(module, leaf)
    with pytest.raises(UnsupportedModelError, match="is pruned.*prune.remove"):
        certify(model)
    assert getattr(module, leaf) is before


@pytest.mark.parametrize("place", ["model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_no_fingerprint_would_see_are_refused(place: str) -> None:
    model = random_model("llama", paper(norms="keep"))
    certificate = certify(model)
    owner, _, leaf = place.rpartition(".")
    module = model.get_submodule(owner)
    value = getattr(module, leaf).detach() * 30
    del module._parameters[leaf]
    module.register_buffer(leaf, value, persistent=False)
    for call in (lambda: certify(model), lambda: certificate.verify(model)):
        with pytest.raises(UnsupportedModelError, match="no Parameter"):
            call()


def test_a_hook_on_state_dict_hides_nothing() -> None:
    model = random_model("gpt2", paper())
    certificate = certify(model)

    def drop(module: Any, state: dict[str, Any], *rest: Any) -> None:
        state.pop("lm_head.weight", None)

    model.register_state_dict_post_hook(drop)
    certificate.verify(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    with pytest.raises(CertificateError, match="other weights"):
        certificate.verify(model)


def test_rounding_is_of_the_function_that_runs() -> None:
    model = random_model("gpt2", paper())
    assert forward_rounding_upper(model, torch.float32, tokens=8) > 0
    model.transformer.h[0].register_forward_hook(lambda m, a, out: out * 2)
    with pytest.raises(CertificateError, match="reproduce"):
        forward_rounding_upper(model, torch.float32, tokens=8)
    with pytest.raises(ConfigError, match="at least 1"):
        forward_rounding_upper(model, torch.float32, tokens=-1)


def _louder(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("never run")


@pytest.mark.parametrize("name", ["_call_impl", "forward", "_compiled_call_impl"])
def test_methods_put_on_a_wrapper_are_seen(name: str) -> None:
    wrapped = nn.DataParallel(random_model("gpt2", paper()))
    setattr(wrapped, name, _louder)
    with pytest.raises(UnsupportedModelError, match="patched forward"):
        certify(wrapped)


def test_a_patched_class_of_a_wrapper_and_a_global_hook_are_seen(monkeypatch: Any) -> None:
    wrapped = nn.DataParallel(random_model("gpt2", paper()))
    with monkeypatch.context() as patched:
        patched.setattr(nn.DataParallel, "forward", _louder)
        with pytest.raises(UnsupportedModelError, match="patched forward"):
            certify(wrapped)
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: None)
    with pytest.raises(UnsupportedModelError, match="hook"):
        certify(wrapped)
    handle.remove()
    assert certify(wrapped).lipschitz > 0


def test_batches_hold_nothing_that_the_proof_does_not_know() -> None:
    model = random_model("gpt2", paper())
    ids = torch.randint(67, (2, 12))
    for more in ("position_ids", "token_type_ids", "inputs_embeds"):
        batch = {"input_ids": ids, "labels": ids, more: torch.zeros_like(ids)}
        with pytest.raises(ConfigError, match=more):
            certified_accuracy(model, [batch])
    for mask in (torch.ones(2, 1, 12, 12), torch.ones(2, 5), torch.ones(2, 13)):
        with pytest.raises(ConfigError, match="who sees whom"):
            certified_accuracy(model, [{"input_ids": ids, "attention_mask": mask}])
    with pytest.raises(ConfigError, match="pixel_values"):
        certified_accuracy(model, [{"input_ids": ids, "pixel_values": torch.ones(2, 2, 12, 12)}])
    assert certified_accuracy(model, [{"input_ids": ids, "attention_mask": ids * 0 + 1}]).clean >= 0
    bert = random_model("bert", paper())
    with_types = {"input_ids": ids, "labels": ids, "token_type_ids": torch.zeros_like(ids)}
    assert certified_accuracy(bert, [with_types]).clean >= 0


def test_a_table_that_renormalizes_is_refused() -> None:
    model = random_model("llama", paper())
    model.model.embed_tokens.max_norm = 0.1
    before = model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(UnsupportedModelError, match="max_norm"):
        certify(model)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_another_attention_in_the_library_is_another_structure(monkeypatch: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = random_model("llama", paper())
    ids = torch.randint(67, (1, 40))
    assert certify(model).lipschitz > 0
    real = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def turned(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = real(module, query, key, value, *args, **kwargs)
        return (-out if query.shape[-2] > 12 else out), weights

    ALL_ATTENTION_FUNCTIONS["sdpa"] = turned
    try:
        for call in (lambda: certify(model), *about(model, ids)):
            with pytest.raises(CertificateError, match="reproduce"):
                call()
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = real
    assert certify(model).lipschitz > 0


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (torch.tensor([[1, -1]]), "lie in"),
        (torch.tensor([[1, 67]]), "lie in"),
        (torch.tensor([[1.0, 2.0]]), "integers"),
        (torch.zeros(1, 65, dtype=torch.long), "at most 64"),
        (torch.zeros(3, dtype=torch.long), "batch, tokens"),
        ([[1, 2]], "tensor"),
        ({"input_ids": 1}, "tensor"),
    ],
)
def test_odd_inputs_are_refused(ids: Any, why: str) -> None:
    model = random_model("gpt2", paper())
    with pytest.raises(ConfigError, match=why):
        certified_radius(model, ids)
    with pytest.raises(ConfigError, match=why):
        activation_report(model, ids)


def test_a_rotation_that_grows_is_put_back() -> None:
    """Asking for a certificate between two calls of a model changes neither."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    short = torch.randint(67, (1, 40))
    logits = []
    for asked in (False, True):
        model: Any = tiny("llama", rope_parameters=rope, max_position_embeddings=64)
        with torch.no_grad():
            model(torch.randint(67, (1, 128), generator=torch.Generator().manual_seed(0)))
            if asked:
                certify(model)
            logits.append(model(short).logits)
    assert torch.equal(*logits)


def test_an_interrupt_leaves_nothing_behind(monkeypatch: Any) -> None:
    """At each place where the model is being changed for the comparison."""
    model = random_model("gpt2", paper()).train()
    real, countdown = nn.Module.register_forward_hook, []

    def interrupted(module: Any, *args: Any, **kwargs: Any) -> Any:
        handle = real(module, *args, **kwargs)
        countdown.append(1)
        if len(countdown) == 2:
            raise KeyboardInterrupt
        return handle

    monkeypatch.setattr(nn.Module, "register_forward_hook", interrupted)
    before = dict(model.named_parameters())
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        certify(model)
    assert all(m.training for m in model.modules())
    assert all(p is before[n] for n, p in model.named_parameters())
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_a_mask_in_a_buffer_is_no_drift_of_zero() -> None:
    """nanoGPT's slow attention reads a float buffer."""
    pair = [random_model("nanogpt", paper()) for _ in range(2)]
    for model, hidden in zip(pair, (1.0, 0.0), strict=True):
        mask = torch.ones(64, 64).tril()
        mask[30:, :20] = hidden
        model.transformer.h[0].attn.register_buffer("bias", mask)
    with pytest.raises(LipschitzError, match="buffer"):
        drift(*pair, attack=False)
