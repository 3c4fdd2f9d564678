"""The drift certificate is above every difference that an attack finds.

It is zero for equal models, and exact where the true drift is known.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from lip_plugin import Drift, LipschitzConfig, drift, project_, retrofit
from lip_plugin.certificate.drift import attention_rule as drift_rules
from lip_plugin.certificate.drift.drift import _Pair
from lip_plugin.errors import ConfigError, NonFiniteError, TrainerError
from tests.support.families import FAMILIES, inputs_for, tiny
from tests.support.oracles import paper


def model_of(family: str, norms: str = "remove", **overrides: Any) -> nn.Module:
    model = tiny(family, num_hidden_layers=1, **overrides)
    if norms == "remove":
        retrofit(model, paper(logit_scale=None))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():  # fresh output maps are zero, and fresh biases
            if not p.any():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    return model.double()


def moved(
    model: nn.Module, size: float, words: tuple[str, ...] = ("",), seed: int = 4
) -> nn.Module:
    """A copy with random numbers added to some parameters.

    These are the parameters whose names hold one of the words. Tables are left as they are.
    """
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in other.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, p in other.named_parameters():
            table = id(p) in tables or "position_embeddings" in name or "cls_token" in name
            if any(w in name for w in words) and (not table or words != ("",)):
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.add_(size * noise / math.sqrt(max(1, p.shape[-1])))
    return other


# a short attack suffices to show a factor that is missing; the slow suite looks for the rest
ATTACKS = [
    ((1e-4, 1.0), {"restarts": 1, "steps": 2}),
    pytest.param((1e-4, 3e-2, 1.0), {"restarts": 3, "steps": 12}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sizes", "attack"), ATTACKS, ids=["short", "long"])
@pytest.mark.parametrize("norms", ["remove", "keep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_attack_exceeds_the_bound(
    family: str, norms: str, sizes: tuple[float, ...], attack: dict[str, int]
) -> None:
    base = model_of(family, norms)
    previous = 0.0
    for size in sizes:
        found = drift(base, moved(base, size), **attack)
        assert 0 < found.logit_lower <= found.logit_upper < math.inf
        assert found.norm_upper <= found.logit_upper * (1 + 1e-12)
        assert previous < found.logit_lower
        previous = found.logit_lower
    if norms == "keep":
        assert found.logit_upper <= 25 * found.logit_lower  # norms bound what any change can do


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gpt_neox", "bert", "vit"])
@pytest.mark.parametrize(
    "words",
    [("q_", "query", "c_attn"), ("k_", "key"), ("v_", "value"), ("bias",), ("norm", "ln_", "Norm")],
)
def test_a_change_of_one_kind_of_weight_is_seen(family: str, words: tuple[str, ...]) -> None:
    base = model_of(family, "keep")
    tuned = moved(base, 0.3, words)
    changed = any(
        not torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True)
    )
    found = drift(base, tuned, restarts=1, steps=2)
    assert found.logit_lower <= found.logit_upper
    assert (found.logit_upper > 0) is changed


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2", "bert"])
def test_equal_models_do_not_drift_at_all(family: str) -> None:
    for norms in ("remove", "keep"):
        base = model_of(family, norms)
        found = drift(base, copy.deepcopy(base), restarts=1, steps=1)
        assert (found.logit_upper, found.logit_lower, found.norm_upper, found.embeddings) == (
            0,
            0,
            0,
            0,
        )


def test_the_bound_falls_with_the_change_linearly() -> None:
    base = model_of("gpt2")
    uppers = [drift(base, moved(base, size), restarts=0).logit_upper for size in (1e-2, 1e-4, 1e-6)]
    assert uppers[1] == pytest.approx(1e-2 * uppers[0], rel=0.2)
    assert uppers[2] == pytest.approx(1e-2 * uppers[1], rel=0.01)


def test_a_change_of_the_head_alone_is_bounded_to_within_what_the_stream_does() -> None:
    """A change of the head alone is bounded exactly, but for the radius.

    The drift is a row of (W_t - W_b) times the last radius.
    """
    base = model_of("gpt2")
    with torch.no_grad():
        for name, p in base.named_parameters():
            if "c_proj" in name:
                p.zero_()  # the stream stays the embedding
    tuned = moved(base, 0.5, ("lm_head",))
    found = drift(base, tuned, restarts=2, steps=10)
    assert found.logit_lower <= found.logit_upper <= 1.001 * found.logit_lower


def test_values_of_one_head_alone_are_bounded_within_a_small_factor() -> None:
    base = model_of("gpt2", num_attention_heads=2)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.transformer.h[0].attn.c_attn.weight[:, -16:] *= 1.5
    found = drift(base, tuned, restarts=4, steps=30)
    assert found.logit_lower <= found.logit_upper <= 8 * found.logit_lower


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt", "bert"])
@pytest.mark.parametrize("norms", ["remove", "keep"])
def test_changed_tables_are_counted_and_inputs_are_then_token_ids(family: str, norms: str) -> None:
    base = model_of(family, norms)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.get_input_embeddings().weight.mul_(0.7)
    if tuned.get_output_embeddings() is not None and norms == "keep":
        tuned.get_output_embeddings().weight = nn.Parameter(
            base.get_output_embeddings().weight.detach().clone()
        )
    found = drift(base, tuned, restarts=1, steps=4)
    assert found.embeddings > 0
    assert 0 < found.logit_lower <= found.logit_upper
    assert "token ids" in found.assumptions[1]
    ids = inputs_for(family)
    with torch.no_grad():
        seen = float((tuned(ids).logits - base(ids).logits).abs().amax())
    assert seen <= found.logit_upper


def test_position_biases_may_have_moved() -> None:
    base = tiny("gpt2", num_hidden_layers=1)
    retrofit(base, LipschitzConfig.preset("robust"))
    with torch.no_grad():
        for name, p in base.named_parameters():
            if "c_proj.weight" in name or "attn.c_proj" in name:
                p.normal_(0, 0.1)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "position_bias" in name:
                p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    found = drift(base, tuned, restarts=4, steps=20)
    assert 0 < found.logit_lower <= found.logit_upper


def test_a_rule_that_forgets_the_values_is_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that forgets the values is exceeded, so that the test above can fail."""
    base = model_of("gpt2")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.transformer.h[0].attn.c_attn.weight[:, 64:] *= 1.5
    real = drift_rules._heads

    def forgetful(b: Any, t: Any, role: str, *rest: Any) -> Any:
        found = real(b, t, role, *rest)
        return [f * 0 for f in found] if role == "v" else found

    monkeypatch.setattr(drift_rules, "_heads", forgetful)
    found = drift(base, tuned, restarts=2, steps=5)
    assert found.logit_lower > found.logit_upper


def test_adapters_are_compared_with_the_model_without_them() -> None:
    peft = pytest.importorskip("peft")
    from tests.support.peft_models import adapted, disturb, state, tuner

    for kind, family in (("lora", "gpt2"), ("dora", "llama"), ("oft", "llama")):
        model = adapted(kind, family, w_max=1.2)
        if kind == "lora":
            model.add_adapter("second", tuner("lora", family))
        disturb(model, 0.05)
        project_(model)
        before = state(model), [p.requires_grad for p in model.parameters()], model.active_adapters
        found = drift(model, restarts=1, steps=3)
        assert 0 < found.logit_lower <= found.logit_upper < math.inf
        assert str(found).endswith(found.summary)
        after = state(model), [p.requires_grad for p in model.parameters()], model.active_adapters
        assert all(
            torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True)
        )
        assert before[1:] == after[1:]
        ids = torch.arange(30).reshape(2, 15)
        with torch.no_grad():
            tuned = model(ids).logits
            with model.disable_adapter():
                base = model(ids).logits
        assert float((tuned - base).abs().amax()) <= found.logit_upper
        alone = copy.deepcopy(model)
        merged = model.merge_and_unload()
        with alone.disable_adapter():
            plain = copy.deepcopy(alone).unload()
        assert drift(plain, merged, restarts=0).logit_upper == pytest.approx(
            found.logit_upper, rel=1e-4
        )
    with pytest.raises(ConfigError, match="no adapters"):
        drift(merged)
    again = peft.get_peft_model(merged, tuner("lora", "llama"))
    assert drift(again, restarts=1, steps=1).logit_upper == 0  # B = 0
    again.merge_adapter()
    with pytest.raises(TrainerError, match="unmerge"):
        drift(again)


def test_models_that_are_not_alike_are_refused() -> None:
    base = model_of("gpt2")
    cases = [
        (tiny("gpt2", num_hidden_layers=1).double(), ConfigError, "structure|otherwise"),
        (model_of("llama"), ConfigError, "other linear maps"),
        (model_of("gpt2", vocab_size=71), ConfigError, "lm_head is"),
    ]
    for other, error, match in cases:
        with pytest.raises(error, match=match):
            drift(base, other, restarts=0)
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        drift(base, broken)
    with pytest.raises(ConfigError, match="restarts"):
        drift(base, base, restarts=-1)


def test_the_attack_computes_what_the_models_compute() -> None:
    base = model_of("llama")
    tuned = moved(base, 0.1)
    pair = _Pair.of(base, tuned)
    ids = inputs_for("llama")
    with torch.no_grad():
        x = pair.base.entry.run(ids, torch.float64)
        got = pair.difference(x, x)
        torch.testing.assert_close(got, tuned(ids).logits - base(ids).logits, rtol=0, atol=1e-6)
    assert isinstance(drift(base, tuned, restarts=0), Drift)
