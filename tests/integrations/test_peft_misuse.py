"""Adapters that are used wrongly get a clear error, and nothing is changed.

Merging, unmerging, saving, loading, disabling and several adapters are here too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")

from lip_plugin import (  # noqa: E402
    Certificate,
    LipschitzMuon,
    attach_projection,
    certify,
    constrain_adapters,
    project_,
    release_adapters,
)
from lip_plugin.errors import (  # noqa: E402
    CertificateError,
    ConfigError,
    NonFiniteError,
    NotRetrofittedError,
    TrainerError,
    UnsupportedModelError,
)
from lip_plugin.integrations.peft.enforce import project_adapters  # noqa: E402
from tests.support.families import tiny  # noqa: E402
from tests.support.peft_models import (  # noqa: E402
    IDS,
    TOLERANCE,
    adapted,
    base_of,
    disturb,
    equal,
    state,
    trainable,
    tuner,
    untouched,
    worst_change,
    worst_merged,
)


def attach(model: Any) -> None:
    attach_projection(torch.optim.SGD(trainable(model), lr=0.1), model)


def unchanged(model: Any, call: Callable[[], Any], error: type, match: str) -> None:
    before, marks = state(model), [dict(m.__dict__) for m in model.modules()]
    with pytest.raises(error, match=match):
        call()
    assert equal(before, state(model))
    assert [set(m.__dict__) for m in model.modules()] == [set(m) for m in marks]


def test_adapters_on_an_untouched_base_without_a_budget() -> None:
    model = untouched("lora", "llama")
    for call in (lambda: attach(model), lambda: LipschitzMuon(model), lambda: project_(model)):
        unchanged(model, call, NotRetrofittedError, r"constrain_adapters\(model, budget=")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_modules_without_a_cap(kind: str) -> None:
    """A layer whose cap was taken off again, in a model that has others."""
    from lip_plugin.model.layers import unconstrain_

    model = adapted(kind, "llama")
    unconstrain_(model.base_model.model.model.layers[0].mlp.up_proj.base_layer)
    match = r"layers\.0\.mlp\.up_proj: LoRA on Linear, which has no cap.*budget=0\.1"
    for call in (
        lambda: attach(model),
        lambda: LipschitzMuon(model),
        lambda: project_adapters(model),
    ):
        unchanged(model, call, UnsupportedModelError, match)


def test_a_base_above_its_cap_says_by_how_much_and_what_to_do() -> None:
    model = adapted("lora", "llama")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.base_layer.weight.mul_(1.25)
    match = (
        r"up_proj: the base weight's up block is 1\.25 times its cap 1.*"
        r"project_\(model\).*larger w_max"
    )
    unchanged(model, lambda: attach(model), ConfigError, match)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_zero_is_refused_by_peft_itself_and_the_base_stays(rank: int) -> None:
    base = base_of("llama")
    before = state(base)
    with pytest.raises(ValueError, match="positive integer"):
        peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules="all-linear"))
    kept = {k.replace(".base_layer", ""): v for k, v in base.state_dict().items()}
    assert equal(before, kept)


@pytest.mark.parametrize("budget", [0, -1.0, float("inf"), float("nan"), True, "0.1", None])
def test_budgets_that_are_no_positive_numbers(budget: Any) -> None:
    model = untouched("lora", "llama")
    unchanged(
        model, lambda: constrain_adapters(model, budget), ConfigError, "finite number above 0"
    )


def test_a_share_of_a_zero_base_is_no_budget() -> None:
    model = peft.get_peft_model(base_of("gpt2", filled=False), tuner("lora", "gpt2"))
    call = lambda: constrain_adapters(model, 0.1, relative=True)  # noqa: E731
    unchanged(model, call, ConfigError, r"c_proj: the base's out block is 0.*relative=False")


def test_budgets_need_lora_layers() -> None:
    for model in (tiny("llama"), adapted("oft", "llama")):
        unchanged(
            model,
            lambda m=model: constrain_adapters(m, 0.1),
            UnsupportedModelError,
            "has no LoRA layer",
        )  # type: ignore[misc]


def test_several_active_adapters_of_which_one_is_dora() -> None:
    model = adapted("dora", "llama")
    model.add_adapter("second", tuner("lora", "llama"))
    model.base_model.set_adapter(["default", "second"])
    unchanged(
        model,
        lambda: attach(model),
        UnsupportedModelError,
        "several active adapters, of which one is DoRA",
    )
    model.set_adapter("second")
    attach(model)
    model.set_adapter("default")
    attach(model)


def test_an_adapter_loaded_on_another_base_is_told_by_its_certificate_or_its_base(
    tmp_path: Any,
) -> None:
    model = adapted("lora", "llama", w_max=1.2)
    disturb(model, 0.05)
    project_(model)
    model.save_pretrained(tmp_path)
    text = certify(model).to_json()
    same = base_of("llama", 1.2)
    same.load_state_dict(
        {
            k.replace(".base_layer", ""): v
            for k, v in model.base_model.model.state_dict().items()
            if "lora" not in k
        }
    )
    Certificate.from_json(text).verify(peft.PeftModel.from_pretrained(same, str(tmp_path)))
    other = base_of("llama", 1.2)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    loaded = peft.PeftModel.from_pretrained(other, str(tmp_path), is_trainable=True)
    unchanged(
        loaded, lambda: Certificate.from_json(text).verify(loaded), CertificateError, "weights"
    )
    attach(loaded)  # whatever the base, what trains is within its caps
    assert worst_merged(loaded) <= 1 + TOLERANCE
    raw = peft.PeftModel.from_pretrained(
        tiny("llama", num_hidden_layers=1), str(tmp_path), is_trainable=True
    )
    unchanged(raw, lambda: attach(raw), NotRetrofittedError, "has no constrained layer")


@pytest.mark.parametrize("kind", ["lora", "dora", "oft", "hra"])
def test_merging_twice_and_training_while_merged(kind: str) -> None:
    model = adapted(kind, "llama", w_max=1.3)
    disturb(model, 0.05)
    project_(model)
    apart = model(input_ids=IDS).logits
    model.merge_adapter()
    once = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's: already merged
        model.merge_adapter()
    assert equal(once, state(model)), "peft merges once"
    for call in (lambda: attach(model), lambda: project_(model), lambda: LipschitzMuon(model)):
        unchanged(model, call, TrainerError, r"unmerge_adapter\(\)")
    assert certify(model).lipschitz > 0  # the merged weight is what is there
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, apart, rtol=0, atol=2e-5)
    attach(model)


def test_an_adapter_merged_into_its_base_and_loaded_again_is_found_above_the_caps(
    tmp_path: Any,
) -> None:
    model = adapted("lora", "llama", w_max=1.05)
    disturb(model, 0.3)
    project_(model)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    again = peft.PeftModel.from_pretrained(merged, str(tmp_path), is_trainable=True)
    assert worst_merged(again) > 1 + TOLERANCE
    attach(again)
    assert worst_merged(again) <= 1 + TOLERANCE


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_non_finite_factors_are_named_under_a_budget_too(kind: str) -> None:
    model = untouched(kind, "llama")
    constrain_adapters(model, 0.1)
    disturb(model, 1.0)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"up_proj\.lora_B\.default"):
        project_(model)


def test_budgets_change_and_go_and_disabled_adapters_count_as_the_base() -> None:
    model = untouched("lora", "llama")
    constrain_adapters(model, 0.5)
    constrain_adapters(model, 0.1)
    disturb(model, 0.5)
    project_(model)
    assert worst_change(model) <= 1 + TOLERANCE
    with model.disable_adapter():
        alone = certify(model).log10_lipschitz
    base = tiny("llama", num_hidden_layers=1)
    assert alone == pytest.approx(certify(base).log10_lipschitz, rel=1e-12)
    assert release_adapters(model) == 7
    with pytest.raises(NotRetrofittedError):
        project_(model)


def test_each_of_several_adapters_is_held_when_it_is_active() -> None:
    model = adapted("lora", "llama", w_max=1.1)
    model.add_adapter("second", tuner("rslora", "llama", r=3))
    for name in ("default", "second"):
        model.set_adapter(name)
        attach(model)
        disturb(model, 0.5, seed=7)
        assert worst_merged(model) > 1.05
        project_(model)
        assert worst_merged(model) <= 1 + TOLERANCE
    model.base_model.set_adapter(["default", "second"])
    project_(model)
    assert worst_merged(model) <= 1 + TOLERANCE


def test_a_budget_survives_saving_the_adapter_by_being_asked_for_again(tmp_path: Any) -> None:
    """A loaded adapter has a budget only after constrain_adapters was called again.

    peft's files hold factors, not budgets.
    """
    model = untouched("dora", "llama")
    constrain_adapters(model, 0.1)
    disturb(model, 0.2)
    project_(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        tiny("llama", num_hidden_layers=1), str(tmp_path), is_trainable=True
    )
    with pytest.raises(NotRetrofittedError):
        project_(again)
    constrain_adapters(again, 0.1)
    before = state(again)
    project_(again)
    assert equal(before, state(again))


def test_one_line_says_what_adapters_may_do(capsys: Any) -> None:
    from lip_plugin import adapter_summary, print_adapter_summary

    model = adapted("lora", "gpt2", w_max=1.2)
    constrain_adapters(model, 0.2)
    disturb(model, 0.3)
    project_(model)
    line = adapter_summary(model, restarts=1, steps=2)
    assert line.startswith("adapters: 4 layers, 15 capped blocks || merged norms <= ")
    assert "of their caps || change <= " in line
    assert "drift: no logit moves by more than" in line
    print_adapter_summary(model, restarts=1, steps=2)
    assert capsys.readouterr().out == line + "\n"
    bare = untouched("lora", "llama")
    constrain_adapters(bare, 0.2)
    assert "0 capped blocks || change <= 0 of its budget" in adapter_summary(bare, restarts=0)
    with pytest.raises(NotRetrofittedError):
        adapter_summary(untouched("lora", "llama"))
