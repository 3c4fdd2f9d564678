"""Every family keeps everything that a retrofit promises about its forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lip_plugin import LipschitzMuon, certify, release, retrofit
from lip_plugin.config_values import LOGIT_SCALE
from lip_plugin.surgery.state import find_retrofit
from tests.support.families import (
    CLASSIFIERS,
    DECODERS,
    FAMILIES,
    HF_FAMILIES,
    POST_NORM,
    inputs_for,
    tiny,
)
from tests.support.oracles import (
    CAP_TOLERANCE,
    Recipe,
    logits_of,
    loss_of,
    paper,
    randomize_,
    retrofitted,
    table_of,
    worst_over_cap,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
hf_family = pytest.mark.parametrize("family", HF_FAMILIES)
decoder = pytest.mark.parametrize("family", DECODERS)
# gemma2's attention has no other form than the library's own, with its softmax in float32. So it is
# exact to a few times 2^-24.
EXACT = {"gemma2": 1e-6}


RECIPES = {
    "paper": {},
    "chosen": {"residual": 0.3, "attention_scale": 0.7, "value_scale": 0.5},
}


@every_family
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_forward_is_the_recipe_to_1e_10(family, recipe):
    chosen = RECIPES[recipe]
    model = retrofitted(family, paper(**chosen)).double()
    expected = Recipe(
        family,
        model,
        residual=chosen.get("residual"),
        logits=chosen.get("attention_scale", 1.0),
        values=chosen.get("value_scale", 1 / 3),
    )(x := inputs_for(family))
    got = logits_of(model, x)
    # both in float64: some hundred roundings of 1e-16, and powers of c up to 1 / 0.3
    off = (got - expected).detach().abs().max() / expected.detach().abs().max()
    assert float(off) < EXACT.get(family, 1e-10)
    assert (
        float((expected[0] - expected[1]).detach().abs().mean()) > 0.05
    )  # it does depend on its input


@every_family
def test_gradients_are_those_of_the_recipe(family):
    model = retrofitted(family).double()
    x = inputs_for(family)
    logits = logits_of(model, x)
    towards = torch.randn_like(logits)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad((logits * towards).sum(), parameters)
    expected = torch.autograd.grad((Recipe(family, model)(x) * towards).sum(), parameters)
    # a key's bias has no gradient where softmax does not see it: what is there is rounding
    least = max(float(e.abs().max()) for e in expected) * 1e-5
    for g, e in zip(got, expected, strict=True):
        assert float((g - e).abs().max()) <= EXACT.get(family, 1e-10) * max(
            float(e.abs().max()), least
        )


@every_family
def test_a_wrong_recipe_is_told_from_the_right_one(family):
    """The two tests above could not fail if the comparison did not see each constant."""
    model, x = retrofitted(family).double(), inputs_for(family)
    got = logits_of(model, x)
    for wrong in ({"residual": 0.26}, {"logits": 1.05}, {"values": 0.34}):
        expected = Recipe(family, model, **wrong)(x)
        assert float((got - expected).detach().abs().max() / expected.detach().abs().max()) > 1e-6


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in POST_NORM])
def test_hidden_states_are_those_of_the_recipe_over_c_k(family):
    """Hidden states are those of the recipe over c_k, u_k = x_k / c_k.

    What enters the final slot, times its constant, is what enters the head.
    """
    model, x = retrofitted(family).double(), inputs_for(family)
    names, seen = table_of(model), {}
    slot, head = model.get_submodule(names.architecture.final_norm), model.get_submodule(names.head)
    slot.register_forward_hook(lambda m, args, out: seen.update(u=args[0]))
    head.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    logits_of(model, x)
    a, steps = (1 / 3, 2) if family == "gpt_neox" else (1 / 4, 4)
    assert slot.scale == pytest.approx((1 - a) ** steps * LOGIT_SCALE, rel=1e-14)
    last = seen["u"][:, 0] if family == "vit" else seen["u"]
    assert torch.equal(last * slot.scale, seen["x"])


@hf_family
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, x = retrofitted(family).train(), inputs_for(family)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.0
    loss_of(model, x).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    loss_of(model, x).backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or torch.equal(p.grad, expected[name]), name


@decoder
def test_generation_is_the_same_with_and_without_cache(family):
    model, x = retrofitted(family), inputs_for(family, tokens=5)
    mask = torch.ones_like(x)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attention_mask": mask,
    }
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with_cache = model.generate(x, use_cache=True, **options)
    without = model.generate(x, use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    assert with_cache.sequences.shape == (2, 17)
    for a, b in zip(with_cache.logits, without.logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)  # float32 in another order of sums


@decoder
def test_padding_on_the_left_changes_no_logit(family):
    """Padding on the left changes no logit, because the mask still reaches the attention."""
    model, x = retrofitted(family), inputs_for(family, tokens=6)
    padded = torch.cat([torch.full((2, 3), 5), x], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(x)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert torch.allclose(got, model(x).logits, rtol=1e-4, atol=1e-4)  # float32


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(family, dtype):
    model = tiny(family).to(dtype)
    retrofit(model, paper())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits_of(model, inputs_for(family)).dtype == dtype
    # orthogonal blocks rounded to bf16: 2^-9 per entry at most, less for the norm of a matrix
    assert worst_over_cap(model) <= 1.0 + (4e-3 if dtype == torch.bfloat16 else 0.0)
    optimizer, x = LipschitzMuon(model, lr=0.1), inputs_for(family)
    for _ in range(3):
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE


@every_family
def test_bf16_autocast_gives_bf16_logits_near_the_float32_ones(family):
    model, x = retrofitted(family), inputs_for(family)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits_of(model, x)
    expected = logits_of(model, x)
    assert got.dtype == torch.bfloat16
    # 8 significant bits through some twenty roundings
    assert (
        float((got.float() - expected).detach().abs().max() / expected.detach().abs().max()) < 0.1
    )


# one of each structure; the others trace the same code
COMPILED = ("gpt2", "llama", "gemma2", "olmo2", "gpt_neox", "opt", "bert", "vit", "nanogpt")
COMPILED += ("llama_classifier", "roberta", "distilbert_classifier")


@pytest.mark.parametrize(
    "family", [f if f in COMPILED else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_it_compiles_as_one_graph_with_the_same_values(family):
    model, x = retrofitted(family), inputs_for(family)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(
            logits_of_compiled(compiled, family, x), logits_of(model, x), rtol=1e-5, atol=1e-5
        )


def logits_of_compiled(compiled, family: str, x: torch.Tensor) -> torch.Tensor:
    if family == "nanogpt":
        return compiled(x, x)[0]
    logits = (compiled(x, use_cache=False) if family in DECODERS else compiled(x)).logits
    return logits if logits.dim() == 3 else logits.unsqueeze(1)


@every_family
def test_training_mode_devices_and_hooks_survive(family):
    model = tiny(family).train()
    model.get_submodule(table_of(model).layers[1].mlp.module).eval()
    flags = {n: m.training for n, m in model.named_modules()}
    calls = []
    model.get_submodule(table_of(model).layers[0].attention.module).register_forward_hook(
        lambda *_: calls.append(1)
    )
    retrofit(model, paper())
    assert all(
        m.training == flags.get(n, flags.get(n.rpartition(".")[0]))
        for n, m in model.named_modules()
    )
    logits_of(model, inputs_for(family))
    assert calls == [1]


@every_family
def test_a_state_dict_moves_to_another_retrofitted_model(family):
    model, x = retrofitted(family), inputs_for(family)
    other = tiny(family)
    retrofit(other, paper())
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(logits_of(other, x), logits_of(model, x))


@every_family
def test_a_deep_copy_is_retrofitted_and_independent(family):
    model, x = retrofitted(family), inputs_for(family)
    twin = copy.deepcopy(model)
    assert find_retrofit(twin)[0] is twin
    assert torch.equal(logits_of(twin, x), logits_of(model, x))
    randomize_(twin, seed=5)
    assert not torch.equal(logits_of(twin, x), logits_of(model, x))
    assert len(release(twin)) > 0
    assert find_retrofit(model) is not None


@every_family
def test_it_trains_within_its_caps_and_under_its_certificate(family):
    model = tiny(family)
    retrofit(model, paper(logit_scale=10.0) if family == "vit" else paper())
    x = inputs_for(family) if family in CLASSIFIERS else torch.arange(24).remainder(7).repeat(2, 1)
    optimizer = LipschitzMuon(model, lr=0.1)
    losses = []
    for _ in range(25):
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - (
        0.1 if family in CLASSIFIERS else 0.3
    )  # one token's five logits
    assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE
    from_weights, from_caps = certify(model), certify(model, "caps")
    # a bound on every step of the run lies above that of this one, biases aside (they have no cap)
    assert 0 < from_weights.lipschitz <= from_caps.lipschitz * (1 + 1e-3) ** 30
