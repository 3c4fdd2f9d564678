"""Options that spend the bound better do what they say.

They are attention by position, absolute values, two residual weights and the logit scale.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from lip_plugin import LipschitzMuon, certify, falsify, project_, release, retrofit
from lip_plugin.errors import ConfigError, UnsupportedModelError
from lip_plugin.model.architecture import find_family
from lip_plugin.model.parts import parts
from lip_plugin.model.position import OffsetBias, biased_attention, position_bias
from lip_plugin.surgery.state import find_retrofit
from lip_plugin.surgery.untrained import untrained
from tests.support.families import DECODERS, ENCODERS, FAMILIES, auto_class, inputs_for, tiny
from tests.support.oracles import Recipe, logits_of, loss_of, paper, randomize_, worst_over_cap

PARALLEL = ("gpt_neox",)
NO_FINAL_NORM = ("opt_post", "opt_projected", *ENCODERS)
# vit has patches, and transformers gives gemma2 no attention by scaled_dot_product_attention
BIASED = [f for f in FAMILIES if f not in ("vit", "gemma2")]
CACHED = [f for f in DECODERS if f in BIASED]
OPTIONS = {
    "position and content": {"position_bias": "learned", "attention_scale": 0.7},
    "by layer": {
        "position_bias": "learned",
        "attention_scale": (0.0, 3.0),
        "value_scale": (1.0, 0.4),
    },
    "position alone": {"position_bias": "alibi", "attention_scale": 0},
    "all": {
        "position_bias": "learned",
        "attention_scale": 0,
        "residual": (0.5, 0.9),
        "value_scale": 1.0,
        "activation": "abs",
        "logit_scale": 3.0,
        "w_max": 1.3,
    },
}


def options_of(family: str, name: str) -> dict:
    """The options that this family has a place for."""
    chosen = dict(OPTIONS[name])
    if family in PARALLEL:
        chosen.pop("residual", None)
    if family in NO_FINAL_NORM:
        chosen.pop("logit_scale", None)
    return chosen


def with_options(family: str, name: str = "all", **overrides):
    """Retrofitted with the options, and random weights everywhere."""
    model = tiny(family, **overrides)
    retrofit(model, paper(**options_of(family, name)))
    randomize_(model)
    names = parts(model, find_family(model).architecture)
    for _, p, zero in untrained(model, names, find_retrofit(model)[1].config):
        if zero:
            p.data.zero_()
    return model


def attention_of(model, index: int = 0):
    return [m for m in model.modules() if position_bias(m) is not None][index]


every_option = pytest.mark.parametrize("name", OPTIONS)
every_family = pytest.mark.parametrize("family", BIASED)
cached = pytest.mark.parametrize("family", CACHED)


@every_option
@every_family
def test_the_forward_is_the_recipe_and_so_are_its_gradients(family, name):
    model, chosen = with_options(family, name).double(), options_of(family, name)
    x = inputs_for(family)
    recipe = Recipe(
        family,
        model,
        residual=chosen.get("residual"),
        logits=chosen["attention_scale"],
        values=chosen.get("value_scale", 1 / 3),
        logit_scale=chosen.get("logit_scale"),
        activation=chosen.get("activation"),
    )
    got, expected = logits_of(model, x), recipe(x)
    exact = 1e-10  # float64, some hundred roundings
    assert float((got - expected).detach().abs().max() / expected.detach().abs().max()) < exact
    towards = torch.randn_like(got)
    trained = [p for p in model.parameters() if p.requires_grad]
    mine = torch.autograd.grad((got * towards).sum(), trained, allow_unused=True)
    theirs = torch.autograd.grad((expected * towards).sum(), trained, allow_unused=True)
    for p, a, b in zip(trained, mine, theirs, strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        assert torch.allclose(a, b, rtol=1e-5, atol=exact * (1 + float(b.abs().max())))
    table = attention_of(model).position_bias.weight
    assert table.requires_grad == (chosen["position_bias"] == "learned")
    with torch.no_grad():
        table[:, 1] += 1.0  # the bias is not without effect
    assert not torch.allclose(logits_of(model, x), got)


@every_option
@every_family
def test_no_attack_exceeds_the_certificate(family, name):
    model = with_options(family, name)
    upper = certify(model)  # compares the graph with the model first
    assert 0 < falsify(model, restarts=1, steps=5, tokens=7).lower_bound <= upper.lipschitz
    project_(model)
    weights, caps = certify(model), certify(model, "caps")
    assert (
        0
        < falsify(model, restarts=1, steps=5, tokens=7).lower_bound
        <= weights.lipschitz
        <= caps.lipschitz
    )
    assert weights.attention_logit <= caps.attention_logit


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanogpt"])
def test_biases_by_position_cost_nothing_whatever_they_are(family):
    """Biases by position change the function and no digit of the bound.

    The table is a thousand times random numbers.
    """
    model, x = with_options(family, "position alone").double(), inputs_for(family)
    before, logits = certify(model), logits_of(model, x)
    with torch.no_grad():
        for m in model.modules():
            if position_bias(m) is not None:
                m.position_bias.weight.copy_(1e3 * torch.randn_like(m.position_bias.weight))
    after = certify(model)
    assert after.lipschitz == before.lipschitz
    assert after.attention_logit > before.attention_logit  # entropy is not certified for free
    assert not torch.allclose(logits_of(model, x), logits)
    assert falsify(model, restarts=2, steps=8, tokens=9).lower_bound <= after.lipschitz


@pytest.mark.parametrize("heads", [1, 2, 4, 12])
def test_tables_start_as_alibi(heads):
    table = OffsetBias(heads, 9, content=True).weight.detach()
    for h in range(heads):
        for offset in range(9):
            # float32: one rounding of the slope and one of the product
            assert float(table[h, offset]) == pytest.approx(
                -offset * 2 ** (-8 * (h + 1) / heads), rel=1e-6
            )


@cached
@pytest.mark.parametrize("name", ["position and content", "all"])
def test_generation_is_the_same_with_and_without_cache(family, name):
    model, x = with_options(family, name), inputs_for(family, tokens=5)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {
        "return_dict_in_generate": True,
        "output_logits": True,
        "attention_mask": torch.ones_like(x),
    }
    one = model.generate(x, use_cache=False, **options)
    for other in (
        model.generate(x, use_cache=True, **options),
        model.generate(x, cache_implementation="static", **options),
    ):
        assert torch.equal(one.sequences, other.sequences)
        for a, b in zip(one.logits, other.logits, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)  # float32 in another order of sums


@cached
def test_padding_on_the_left_changes_no_logit(family):
    model, x = with_options(family), inputs_for(family, tokens=6)
    padded = torch.cat([torch.full((2, 3), 5), x], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(x)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(got[:, 3:], model(x).logits, rtol=1e-4, atol=1e-4)  # float32
    assert bool(got.isfinite().all())  # rows that see nothing stay numbers


@every_family
def test_it_trains_within_its_caps_and_what_is_fixed_stays(family):
    model = tiny(family)
    retrofit(model, paper(**options_of(family, "all"), biases="drop"))
    fixed = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer, x = LipschitzMuon(model, lr=0.1, adamw_lr=0.1), inputs_for(family)
    table = attention_of(model).position_bias.weight
    start = table.detach().clone()
    losses = []
    for _ in range(8):
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert worst_over_cap(model) <= 1 + 1e-3
    assert not torch.equal(table, start)
    assert all(torch.equal(p, fixed[n]) for n, p in model.named_parameters() if n in fixed)
    assert certify(model).lipschitz <= certify(model, "caps").lipschitz


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "nanogpt"])
def test_learned_positions_make_room_for_biases(family):
    """The table is zero and fixed, and the tokens have all of embedding_max but a millionth."""
    model = tiny(family)
    retrofit(model, paper(position_bias="learned"))
    state = find_retrofit(model)[1]
    table = model.get_submodule(state.architecture.positions)
    assert not table.weight.any()
    assert not table.weight.requires_grad
    share = 1.0 if family != "bert" else 0.5  # token types have their part
    tokens = model.get_submodule(state.architecture.tokens)
    assert tokens.layout.segments[0].cap == pytest.approx(share, rel=1e-5)
    assert certify(model, "caps").radius <= 1 + 1e-8


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own import
@pytest.mark.parametrize("family", ["gpt2", "llama", "nanogpt"])
@pytest.mark.parametrize("name", ["position and content", "all"])
def test_it_compiles_as_one_graph_with_the_same_values(family, name):
    model, x = with_options(family, name), inputs_for(family)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(x, x)[0] if family == "nanogpt" else compiled(x, use_cache=False).logits
        assert torch.allclose(got, logits_of(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CACHED)
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, x = with_options(family).train(), inputs_for(family)
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(m, attribute, None), float):
                setattr(m, attribute, 0.0)
    loss_of(model, x).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    loss_of(model, x).backward()
    for name, p in model.named_parameters():
        assert p.grad is None or torch.equal(p.grad, expected[name]), name


@pytest.mark.parametrize("family", [f for f in BIASED if f != "nanogpt"])
@every_option
def test_it_is_saved_and_loaded_with_its_function_and_what_is_fixed(family, name, tmp_path):
    model, x = with_options(family, name), inputs_for(family)
    model.save_pretrained(tmp_path)
    loaded = auto_class(family).from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, x), logits_of(model, x))
    assert find_retrofit(loaded)[1].config == find_retrofit(model)[1].config
    unused = find_retrofit(model)[1].architecture.unused
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and n not in unused}
    assert {
        n for n, p in loaded.named_parameters() if not p.requires_grad and n not in unused
    } == frozen
    assert certify(loaded).lipschitz == certify(model).lipschitz


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_copies_pickles_and_released_models_keep_the_function(family):
    model, x = with_options(family), inputs_for(family)
    expected = logits_of(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(twin, x), expected)
        assert isinstance(attention_of(twin), type(attention_of(model)))
    release(model)
    assert torch.equal(logits_of(model, x), expected)
    retrofit(model, paper(**options_of(family, "all"), method="hard_cap"))
    assert torch.equal(logits_of(model, x), expected)  # tables that are there are kept
    release(model)
    retrofit(model, paper())
    assert not any(position_bias(m) is not None for m in model.modules())
    assert certify(model).lipschitz < math.inf


def test_dropout_of_attention_acts_on_position_alone_too():
    torch.manual_seed(0)
    bias = OffsetBias(2, 8, content=False)
    q, k, v = (torch.randn(3, 2, 8, 4) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    calm = biased_attention(bias, attend, q, k, v, is_causal=True)
    runs = torch.stack(
        [biased_attention(bias, attend, q, k, v, is_causal=True, dropout_p=0.5) for _ in range(800)]
    )
    assert not torch.allclose(runs[0], calm)
    # mean of 800 runs: entries of size 1 with deviation of about 1 each
    assert torch.allclose(runs.mean(0), calm, atol=6 / 800**0.5)


def test_without_content_queries_and_keys_change_nothing():
    bias = OffsetBias(2, 8, content=False)
    q, k, v = (torch.randn(3, 2, 8, 4) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    out = biased_attention(bias, attend, q, k, v, is_causal=True)
    assert torch.equal(out, biased_attention(bias, attend, 9 * q, -k, v, is_causal=True))
    bias.content = True
    zero = biased_attention(bias, attend, 0 * q, k, v, is_causal=True)
    assert torch.allclose(out, zero, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {"attention_scale": 0, "position_bias": None}, "position_bias"),
        ("gpt2", {"norms": "keep", "activation": "abs"}, "activation"),
        ("gpt2", {"norms": "keep", "logit_scale": 2.0}, "logit_scale"),
        ("gpt2", {"residual": (0.5, 1.0)}, "residual"),
        ("gpt2", {"residual": "deep"}, "residual"),
        ("gpt2", {"residual": (0.5,)}, "residual"),
        ("gpt2", {"position_bias": "rotary"}, "learned"),
        ("llama", {"activation": "abs", "gate_max": 8.0}, "gate_max"),
        ("gpt_neox", {"residual": (0.5, 0.9)}, "parallel"),
        ("bert", {"logit_scale": 2.0}, "overrides"),
        ("vit", {"position_bias": "learned"}, "patches"),
        ("gemma2", {"position_bias": "learned"}, "attn_implementation"),
    ],
)
def test_what_has_no_place_is_refused_before_anything_changes(family, fields, message):
    model = tiny(family)
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ConfigError, match=message):
        retrofit(model, paper(**fields))
    assert {n: type(m) for n, m in model.named_modules()} == before


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_residual_weights_that_leave_float32_are_refused_and_the_default_does_not(family):
    weights = (0.75, 0.9) if family == "gpt2" else 0.95
    deep = tiny(family, num_hidden_layers=30)
    with pytest.raises(ConfigError, match="Leave residual out"):
        retrofit(deep, paper(residual=weights))
    retrofit(deep, paper())
    randomize_(deep)
    project_(deep)
    x = inputs_for(family)
    exact = Recipe(family, deep.double())(x)
    deep.float()
    loss_of(deep, x).backward()
    assert all(
        bool(p.grad.isfinite().all()) and bool(p.grad.any())
        for p in deep.parameters()
        if p.requires_grad
    )
    # float32: some hundred roundings of 6e-8, and none that overflowed
    assert (
        float((logits_of(deep, x) - exact).detach().abs().max() / exact.detach().abs().max()) < 1e-4
    )


def test_an_attention_that_does_not_use_the_function_is_noticed():
    model, x = with_options("gpt2"), inputs_for("gpt2")
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="sdpa"):
        model(x)


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanogpt"])
def test_tables_of_biases_move_at_half_the_matrices_rate(family):
    """AdamW's first step is its rate in every entry that has a gradient, whatever adamw_lr is."""
    model = tiny(family)
    retrofit(model, paper(**options_of(family, "all")))
    randomize_(model)
    table = attention_of(model).position_bias.weight
    before = table.detach().clone()
    optimizer = LipschitzMuon(model, lr=0.08, adamw_lr=1e-5)
    loss_of(model, inputs_for(family)).backward()
    seen = table.grad != 0
    optimizer.step()
    assert bool(seen.any())
    moved = (table - before).detach().abs()
    # 1e-3: eps of AdamW against gradients of 1e-5 and more
    assert torch.allclose(moved[seen], torch.full_like(moved[seen], 0.04), rtol=1e-2)
    assert not moved[~seen].any()
