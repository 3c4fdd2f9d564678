"""What surgery refuses is left as it was bit for bit, and what it reports was done."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Model

from lip_plugin import LipschitzConfig, certify, release, retrofit
from lip_plugin.config_values import LOGIT_SCALE
from lip_plugin.errors import (
    ConfigError,
    LipschitzError,
    NonFiniteError,
    TiedWeightsError,
    UnsupportedModelError,
)
from lip_plugin.model.architecture import find_family
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.parts import parts
from lip_plugin.model.scales import ConstantScale, branch_scale
from lip_plugin.surgery.state import find_retrofit
from tests.support.families import FAMILIES, tiny
from tests.support.oracles import assert_unchanged, fingerprint, logits_of, paper, randomize_


def other_family(name: str, **fields) -> nn.Module:
    """A tiny model of a family that the table does not have."""
    common = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        name, **{**common, "max_position_embeddings": 32, "pad_token_id": None, **fields}
    )
    return AutoModelForCausalLM.from_config(config).eval()


def refuse(
    model: nn.Module, error: type[LipschitzError], match: str, config: LipschitzConfig | None = None
) -> None:
    """The retrofit raises, by name, and nothing of the model has changed."""
    before = fingerprint(model)
    with pytest.raises(error, match=match):
        retrofit(model, config)
    assert_unchanged(model, before)
    assert find_retrofit(model) is None


def test_the_comparison_behind_the_refusals_sees_any_change():
    for change in (
        lambda m: m.lm_head.weight.data.mul_(1.0 + 2**-20),
        lambda m: setattr(m.model, "norm", ConstantScale(1.0)),
        lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.5),
        lambda m: m.model.layers[0].mlp.register_forward_hook(lambda *_: None),
        lambda m: setattr(m, "lm_head", nn.Linear(32, 67, bias=False)),
        lambda m: m.model.layers[0].train(),
        lambda m: setattr(m.config, "hidden_act", "relu"),
        lambda m: m.lm_head.weight.requires_grad_(False),
    ):
        model = tiny("llama")
        before = fingerprint(model)
        assert_unchanged(model, before)
        change(model)
        with pytest.raises(AssertionError):
            assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["phi", "gpt_bigcode", "bloom"])
def test_an_unknown_family_is_refused_by_name_with_the_way_to_describe_it(name):
    refuse(
        other_family(name, intermediate_size=48), UnsupportedModelError, f"{name}.*register_family"
    )


def test_an_encoder_is_refused_by_name():
    config = AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=67
    )
    config.is_decoder = True
    refuse(AutoModelForCausalLM.from_config(config), UnsupportedModelError, "bert")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_mixture_of_experts_is_refused_by_what_it_is(name):
    few = {
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    }
    experts = (
        {"num_local_experts": 2}
        if name == "mixtral"
        else {"num_experts": 2, "num_experts_per_tok": 1}
    )
    refuse(
        other_family(name, **few, **experts),
        UnsupportedModelError,
        r"mlp is .*SparseMoeBlock.*[Mm]ixture-of-experts",
    )


def test_a_model_without_a_language_model_head_is_refused():
    refuse(GPT2Model(tiny("gpt2").config), UnsupportedModelError, "language-model head")


def test_a_plain_module_is_refused():
    refuse(nn.Sequential(nn.Linear(3, 3)), UnsupportedModelError, "Sequential")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_meta_device_is_refused(family):
    refuse(tiny(family).to("meta"), UnsupportedModelError, "meta device")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_integer_weight_is_refused_by_name(family):
    model = tiny(family)
    name = parts(model, find_family(model).architecture).layers[1].mlp.linears["down"]
    module = model.get_submodule(name)
    module.weight = nn.Parameter(
        module.weight.detach().mul(100).to(torch.int8), requires_grad=False
    )
    refuse(model, UnsupportedModelError, f"{name}.*int8")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_that_is_not_finite_is_refused_by_name(family, value):
    model = tiny(family)
    roles = parts(model, find_family(model).architecture).layers[1].mlp.linears
    name = roles.get("up") or roles["gate_up"]
    with torch.no_grad():
        model.get_submodule(name).weight[3, 5] = value
    refuse(model, NonFiniteError, f"{name}.weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_overrides_that_match_nothing_are_refused_with_names_that_would(family):
    refuse(
        tiny(family),
        ConfigError,
        r"(?s)mlp\.nothing.*named like",
        paper(overrides={"mlp.nothing": 1.0}),
    )
    # a suffix is cut at dots: "proj" is not "c_proj" or "o_proj"
    refuse(tiny(family), ConfigError, "'proj'", paper(overrides={"proj": 1.0}))


def test_weights_tied_in_conflict_are_refused_by_their_names():
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = attention.v_proj.weight
    refuse(model, TiedWeightsError, r"k_proj.*v_proj")
    model = tiny("gpt2")
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    refuse(model, TiedWeightsError, r"h\.0\.mlp.*h\.1\.mlp")


@pytest.mark.parametrize("family", ["gpt2", "nanogpt"])
def test_a_tied_head_that_may_not_be_untied_is_refused(family):
    refuse(tiny(family), TiedWeightsError, "untie_head=True", paper(untie_head=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_of_another_class_is_refused_before_anything_is_changed(family):
    """A layer of another class is refused before anything is changed.

    A quantized or wrapped layer computes something else, and so does a scaling embedding.
    """

    class Odd(nn.Linear):
        pass

    class Scaling(nn.Embedding):
        def forward(self, x):
            return 5.0 * super().forward(x)

    model = tiny(family)
    names = parts(model, find_family(model).architecture)
    name = names.layers[1].mlp.linears["down"]
    module = model.get_submodule(name)
    plain, module.__class__ = type(module), Odd
    refuse(model, UnsupportedModelError, f"{name}.*Odd")
    module.__class__ = plain
    if names.architecture.tokens:
        model.get_submodule(names.architecture.tokens).__class__ = Scaling
        refuse(model, UnsupportedModelError, f"{names.architecture.tokens}.*(Scaling|Embedding)")
    else:
        model.get_submodule(names.architecture.patches).stride = (2, 2)
        refuse(model, UnsupportedModelError, f"{names.architecture.patches}.*stride")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_activation_without_a_proven_slope_is_refused_by_name(family):
    class Square(nn.Module):
        def forward(self, x):
            return x * x

    model = tiny(family)
    name = parts(model, find_family(model).architecture).layers[1].mlp.act
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, Square())
    refuse(model, UnsupportedModelError, f"{name}.*Square")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_parameter_that_nobody_described_is_refused(family):
    model = tiny(family)
    name = parts(model, find_family(model).architecture).layers[0].mlp.module
    model.get_submodule(name).extra = nn.Linear(2, 2)
    refuse(model, UnsupportedModelError, f"{name}.extra")


def test_an_embedding_that_renormalizes_itself_is_refused():
    model = tiny("gpt2")
    model.transformer.wte.max_norm = 1.0
    refuse(model, UnsupportedModelError, "max_norm")


def test_cross_attention_is_refused():
    refuse(tiny("gpt2", add_cross_attention=True), UnsupportedModelError, "(?i)cross.?attention")


def test_an_adapted_model_is_refused_with_the_right_order():
    peft = pytest.importorskip("peft")
    base = tiny("llama")
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    refuse(wrapped, UnsupportedModelError, "get_peft_model")
    refuse(base, UnsupportedModelError, r"(?s)adapter.*get_peft_model")


def test_a_compiled_model_is_refused_with_the_right_order():
    refuse(
        torch.compile(tiny("llama"), backend="eager"),
        UnsupportedModelError,
        "(?i)before.*(wrap|compile)",
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_pretrained_model_is_refused_unless_norms_is_chosen_in_words(family, tmp_path):
    randomize_(tiny(family)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    refuse(model, ConfigError, r"(?s)pretrained.*norms='keep'.*norms='remove'")
    x = torch.randint(67, (2, 9))
    expected = logits_of(model, x)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    retrofit(model, paper(norms="keep"))
    assert torch.equal(logits_of(model, x), expected)
    release(model)
    retrofit(model, paper(norms="remove"))
    assert not torch.allclose(logits_of(model, x), expected, atol=1e-2)
    # whoever says "remove" of a loaded model keeps its weights: "auto" initializes only fresh ones
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_that_are_gone_cannot_be_kept(family):
    model = tiny(family)
    retrofit(model)
    release(model)
    refuse(model, ConfigError, "norms.*gone", paper(norms="keep"))


def test_config_none_means_the_defaults():
    model, other = tiny("llama"), tiny("llama")
    torch.manual_seed(3)
    retrofit(model)
    torch.manual_seed(3)
    retrofit(other, LipschitzConfig())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert find_retrofit(model)[1].config == find_retrofit(other)[1].config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_has_a_line_for_every_change_and_prints_as_a_table(family):
    model = tiny(family)
    names = parts(model, find_family(model).architecture)
    report = retrofit(model, paper(w_max=1.25))
    told = [name for name, _ in report.changes]
    assert {*names.norms(), *(name for _, name in names.tables()), names.head} <= set(told)
    assert {name for name, _ in constrained_modules(model)} <= set(told)
    for branch in (b for layer in names.layers for b in layer.branches):
        assert branch.branch_norm in told or branch.scale in told
    text = str(report)
    assert len(text.splitlines()) == len(report)
    assert "1.25" in text


def test_the_constants_are_those_of_the_telescoped_residual():
    """The constants are those of the telescoped residual.

    c_k = (1-a)^k stands in the slots, a / c_(k+1) on the branches, 1/3 on attention, 1 / d_head on
    logits, and the scale comes last.
    """
    model = tiny("gpt2", num_hidden_layers=3)
    retrofit(model, paper())
    a, c = 1 / 6, [(5 / 6) ** k for k in range(7)]
    for i, layer in enumerate(model.transformer.h):
        assert layer.ln_1.scale == pytest.approx(c[2 * i], rel=1e-15)
        assert layer.ln_2.scale == pytest.approx(c[2 * i + 1], rel=1e-15)
        assert branch_scale(layer.attn) == pytest.approx(a / c[2 * i + 1] / 3, rel=1e-15)
        assert branch_scale(layer.mlp) == pytest.approx(a / c[2 * i + 2], rel=1e-15)
        assert layer.attn.scaling == 1 / 8
    assert model.transformer.ln_f.scale == pytest.approx(c[6] * LOGIT_SCALE, rel=1e-15)


def test_constants_do_not_pile_up_over_release_and_retrofit():
    model = tiny("nanogpt")
    retrofit(model)
    before = fingerprint(model)["modules"]
    for _ in range(3):
        release(model)
        retrofit(model)
    after = fingerprint(model)["modules"]
    assert [(n, c, p) for n, c, _, _, p in after] == [(n, c, p) for n, c, _, _, p in before]
    assert all(
        branch_scale(m) != 1.0 for n, m in model.named_modules() if n.endswith((".attn", ".mlp"))
    )


def test_frozen_parameters_stay_frozen_and_an_untied_head_inherits():
    model = tiny("gpt2")
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    retrofit(model, paper())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        "transformer.wte.weight",
        "lm_head.weight",
        "transformer.h.0.attn.c_attn.weight",
    }


def test_a_retrofit_inside_inference_or_no_grad_still_trains():
    model = tiny("llama")
    with torch.no_grad():
        retrofit(model, paper())
    logits_of(model, torch.randint(67, (2, 9))).sum().backward()
    assert all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_any_number_of_heads_is_understood(heads):
    for family in ("gpt2", "llama"):
        fields = {"num_key_value_heads": 1} if family == "llama" else {}
        model = tiny(family, num_attention_heads=heads, num_hidden_layers=1, **fields)
        retrofit(model)
        counts = {s.role: s.count for _, m in constrained_modules(model) for s in m.layout.segments}
        assert counts["q"] == heads
        assert counts["k"] == (1 if family == "llama" else heads)
        assert math.isfinite(certify(model).lipschitz)


def test_every_refusal_is_one_of_our_named_errors():
    for error in (UnsupportedModelError, TiedWeightsError, ConfigError, NonFiniteError):
        assert issubclass(error, LipschitzError)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bert", "vit", "nanogpt"])
def test_a_model_without_layers_is_refused(family):
    with pytest.raises(UnsupportedModelError, match="at least one"):
        retrofit(tiny(family, num_hidden_layers=0), paper())
