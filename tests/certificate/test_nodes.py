"""Rules that only some families need hold under attack.

They are about rotations of every kind, images, fused rows and adapters.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import nn

from lip_plugin import certify, falsify, retrofit
from lip_plugin.certificate.comparison.compare import check_graph
from lip_plugin.certificate.graph.attention import attentions
from lip_plugin.certificate.graph.base import LinearNorms
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.graph.containers import Chain, Parallel
from lip_plugin.certificate.graph.nodes import Norm, OneToken, Scale, Softcap
from lip_plugin.certificate.input_radius import radius_of
from lip_plugin.certificate.weight_norms import cap_norms, weight_norms
from lip_plugin.errors import CertificateError, UnsupportedModelError
from lip_plugin.model.scales import input_scale, set_input_scale_
from tests.support.families import DECODERS, inputs_for, tiny
from tests.support.oracles import logits_of, paper, rand, randomize_

NONE: dict[str, LinearNorms] = {}


def token_norm(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean(-1).sqrt().amax())


# ---- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [0.3, 2.0, -2.0])
@pytest.mark.parametrize("r", [0.1, 1.0, 40.0])
def test_a_softcap_is_bounded_by_itself_and_never_steeper_than_one(cap: float, r: float) -> None:
    node, x = Softcap("cap", cap), r * torch.randn(50, 4, dtype=torch.float64).clamp(-1, 1)
    b = node.bound(Decimal(r), NONE)
    assert token_norm(node.run(x)) <= float(b.radius) <= min(r, abs(cap)) * (1 + 1e-15)
    slopes = (node.run(x + 1e-6) - node.run(x)) / 1e-6
    assert float(slopes.abs().max()) <= float(b.lipschitz) + 1e-9  # rounding of the difference
    at_zero = node.run(torch.tensor([1e-9], dtype=torch.float64)) / 1e-9
    assert float(at_zero) == pytest.approx(1.0, abs=1e-9)  # attained


def test_parallel_branches_add_up_and_a_positive_multiple_attains_it() -> None:
    node = Parallel("layer", [Chain("f", [Scale("f", 0.5)]), Chain("g", [Scale("g", 0.25)])])
    b, x = node.bound(Decimal(2), NONE), torch.ones(1, 3, 5)
    assert torch.equal(node.run(x), 1.75 * x)
    assert (float(b.lipschitz), float(b.radius)) == (1.75, 3.5)


@pytest.mark.parametrize("index", [0, -1])
def test_one_token_moves_as_far_as_the_furthest_at_most_and_attains_it(index: int) -> None:
    node, x = OneToken("one token", index), rand(2, 5, 7, seed=3)
    assert torch.equal(node.run(x), x[:, [index]])
    b = node.bound(Decimal(token_norm(x)), NONE)
    assert token_norm(node.run(x)) <= float(b.radius) == token_norm(x)
    for at in range(5):
        change = torch.zeros_like(x)
        change[:, at] = 2.0
        moved = token_norm(node.run(x + change) - node.run(x))
        # 1e-14: float64 rounding of x + change
        assert moved <= float(b.lipschitz) * token_norm(change) * (1 + 1e-14)
        assert (moved > 1.9) == (at == index % 5)  # attained by the token that is kept


def test_gemmas_gain_is_one_plus_its_weight_and_never_below_it() -> None:
    """The node's gain is at least as far from zero as the exact 1 + w, which rounds."""
    model: Any = randomize_(tiny("gemma2"))
    slot = build(model).body.nodes[-3]
    assert isinstance(slot, Norm)
    weight = model.model.norm.weight.detach().double()
    exact = [abs(1 + Decimal(float(w))) for w in weight]
    assert all(Decimal(float(g)) >= e for g, e in zip(slot.weight.abs(), exact, strict=True))
    assert torch.allclose(slot.weight, 1.0 + weight, rtol=1e-15, atol=0)


# ---- rotations -----------------------------------------------------------------------------------

ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 32},
    "longrope": {
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 8,
    },
}


def rotated(kind: str, family: str = "llama", **fields: Any) -> Any:
    parameters = {"rope_type": kind, "rope_theta": 1e4, **ROTATIONS.get(kind, {}), **fields}
    return tiny(family, rope_parameters=parameters)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_every_rotary_scaling_is_an_isometry_times_its_factor_and_certified(kind: str) -> None:
    model = rotated(kind)
    retrofit(model, paper())
    randomize_(model)
    upper = certify(model)
    assert falsify(model, restarts=3, steps=12, tokens=9).lower_bound <= upper.lipschitz
    factor = next(attentions(build(model).body.nodes))[1].rotary.attention_scaling
    assert (factor > 1.1) == (kind in ("yarn", "longrope"))
    model.double()  # and beyond the length where longrope and dynamic change their frequencies
    x = torch.randint(67, (2, 70))
    got = build(model).body.run(build(model).embed(x, torch.float64))
    expected = logits_of(model, x)
    assert float((got - expected).detach().abs().max() / expected.detach().abs().max()) < 1e-4


def test_a_rotation_that_scales_more_than_it_says_is_refused() -> None:
    """A rotation that scales more than it says is refused.

    The library's function is doubled, with its attention_scaling as before.
    """
    model = rotated("default")
    inner = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda *args, **kwargs: tuple(
        2 * t for t in inner(*args, **kwargs)
    )
    with pytest.raises(CertificateError, match="rule is proven"):
        certify(model)
    del model.model.rotary_emb.forward
    assert math.isfinite(certify(model).lipschitz)


def test_what_a_partial_rotation_leaves_alone_keeps_its_size() -> None:
    """What a partial rotation leaves alone keeps its size.

    attention_scaling below 1 shrinks the turned half only, so that the bound's factor must stay 1.
    """
    model = rotated("yarn", "gpt_neox", partial_rotary_factor=0.5, attention_factor=0.5)
    rotary = next(attentions(build(model).body.nodes))[1].rotary
    assert rotary.scale == 0.5
    assert rotary.attention_scaling == 1.0
    assert math.isfinite(certify(model).lipschitz)


# ---- fused rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neox_sequential", "phi3", "granite", "olmo2"])
def test_fused_and_interleaved_maps_are_measured_part_by_part(family: str) -> None:
    """Each head of q, k and v, and each of gate and up, is measured by itself.

    The truth is a float64 SVD of the rows as the library reads them.
    """
    model: Any = randomize_(tiny(family))
    retrofit(model, paper(init="keep", w_max=0.9))
    randomize_(model)
    graph = build(model)
    measured = weight_norms(graph)
    for _, attention in attentions(graph.body.nodes):
        module = model.get_submodule(attention.name)
        if family.startswith("gpt_neox"):
            rows = module.query_key_value.weight.unflatten(0, (4, 3, -1)).unbind(1)
        elif family == "phi3":
            rows = module.qkv_proj.weight.split([32, 16, 16])
        else:
            rows = (module.q_proj.weight, module.k_proj.weight, module.v_proj.weight)
        for role, p, weight in zip(
            "qkv", (attention.q, attention.k, attention.v), rows, strict=True
        ):
            heads = weight.detach().double().reshape(p.heads, -1, 32)
            exact = torch.linalg.svdvals(heads)[:, 0].tolist()
            found = measured[p.linear.name].heads[role]
            assert all(e <= float(f) <= e * 1.001 for e, f in zip(exact, found, strict=True))
            whole = float(torch.linalg.matrix_norm(heads.flatten(0, 1), 2))
            assert whole <= float(measured[p.linear.name].whole[role])
    if family == "phi3":
        both = model.model.layers[0].mlp.gate_up_proj
        for part, weight in zip(
            ("gate", "up"), both.weight.detach().double().chunk(2), strict=True
        ):
            found = measured[f"model.layers.0.mlp.gate_up_proj[{part}]"]
            exact = float(torch.linalg.matrix_norm(weight, 2))
            assert exact <= float(found.sigma) <= exact * 1.001
            assert float(weight.norm(dim=-1).max()) <= float(found.row)
    from lip_plugin import project_

    project_(model)
    measured, capped = weight_norms(graph), cap_norms(graph)
    for name, norms in measured.items():
        assert norms.sigma <= capped[name].sigma
        assert all(norms.whole[r] <= capped[name].whole[r] for r in norms.whole)
        assert all(
            a <= b
            for r in norms.heads
            for a, b in zip(norms.heads[r], capped[name].heads[r], strict=True)
        )


def test_interleaved_heads_are_blocks_of_the_stored_weight() -> None:
    model: Any = tiny("gpt_neox")
    retrofit(model, paper())
    layout = model.gpt_neox.layers[0].attention.query_key_value.layout
    assert [s.role for s in layout.segments] == ["q", "k", "v"] * 4
    assert layout.covers(model.gpt_neox.layers[0].attention.query_key_value.weight)


# ---- multipliers and softcaps --------------------------------------------------------------------


def test_multipliers_and_softcaps_leave_the_forward_and_the_config() -> None:
    model: Any = tiny("granite")
    retrofit(model, paper())
    assert model.model.embedding_multiplier == model.config.embedding_multiplier == 1.0
    assert model.model.layers[1].residual_multiplier == model.config.residual_multiplier == 1.0
    assert model.config.logits_scaling == 1.0
    model = tiny("gemma2")
    retrofit(model, paper())
    assert model.model.layers[0].self_attn.attn_logit_softcapping is None
    assert model.config.attn_logit_softcapping is None
    assert model.config.final_logit_softcapping is None
    assert (
        float(model.model.embed_tokens.embed_scale)
        == model.model.embed_tokens.scalar_embed_scale
        == 1.0
    )


@pytest.mark.parametrize(
    ("family", "factor"), [("granite", 3.0), ("gemma2", 32**0.5), ("gemma3", 32**0.5)]
)
def test_kept_multipliers_of_the_embedding_are_in_the_radius(family: str, factor: float) -> None:
    model = randomize_(tiny(family))
    table = model.get_input_embeddings().weight
    graph = build(model)
    seen = token_norm(graph.embed(torch.arange(67)[None], torch.float64))
    # the scale is stored in float32, row norms are rounded up
    assert seen == pytest.approx(factor * token_norm(table), rel=1e-6)
    assert seen <= float(radius_of(graph, "weights")) <= seen * 1.001


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "granite"])
def test_the_multiplier_of_a_skeleton_is_that_of_the_loaded_model(family: str) -> None:
    """The multiplier of a skeleton is that of the loaded model.

    On the meta device gemma's buffer has no value, and the float that fills it is read instead.
    """
    for config in (None, paper()):
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny(family).to(dtype)
            if config is not None:
                retrofit(model, config)
            expected = build(model).entry.tables["token"].scale
            assert build(model.to("meta")).entry.tables["token"].scale == expected


def test_a_multiplier_without_a_value_is_refused() -> None:
    """It is not taken for 1: a skeleton of gemma whose float was lost has an unknown radius."""
    model: Any = tiny("gemma2").to("meta")
    del model.model.embed_tokens.scalar_embed_scale
    model.model.embed_tokens.scalar_embed_scale = model.model.embed_tokens.embed_scale
    with pytest.raises(UnsupportedModelError, match="no value on the meta device"):
        build(model)


def test_a_capped_attention_without_rotation_is_refused() -> None:
    """Attention with a softcap and without rotation is refused.

    Its rule leaves out a key's bias, which softmax does not see. Behind a softcap it does.
    """
    from dataclasses import replace

    from lip_plugin.model import architecture as core

    family = core._FAMILIES["gemma2"]
    flat = replace(family.architecture, rotary=None)
    core._FAMILIES["gemma2"] = replace(family, architecture=flat)
    try:
        with pytest.raises(UnsupportedModelError, match="unturned keys"):
            certify(tiny("gemma2"))
    finally:
        core._FAMILIES["gemma2"] = family


# ---- hooks and adapters --------------------------------------------------------------------------


def test_an_input_scale_reaches_keyword_and_positional_arguments_and_is_replaced_not_added() -> (
    None
):
    class Branch(nn.Module):
        def forward(self, hidden_states, other=1.0):
            return hidden_states * other

    branch, x = Branch(), torch.ones(3)
    for scale in (3.0, 0.5):
        set_input_scale_(branch, scale)
        assert input_scale(branch) == scale
        assert torch.equal(branch(x), scale * x)
        assert torch.equal(branch(hidden_states=x, other=2.0), 2 * scale * x)
    set_input_scale_(branch, None)
    assert torch.equal(branch(x), x)
    assert not branch._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize(
    "family", [f for f in DECODERS if f not in ("gpt2", "llama", "mistral", "qwen3")]
)
def test_an_adapter_is_scaled_like_the_map_it_wraps(family: str) -> None:
    """An adapter is one function unmerged, merged, and as the certificate reads it.

    This holds for every linear map of a block.
    """
    peft = pytest.importorskip("peft")
    model: Any = tiny(family)
    retrofit(model, paper())
    randomize_(model)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).double().eval()
    x = inputs_for(family)
    with torch.no_grad():
        unmerged = logits_of(wrapped, x)
        check_graph(build(wrapped))  # raises if the graph with merged weights is not this model
        merged = logits_of(wrapped.merge_and_unload(), x)
    assert (
        float((unmerged - merged).abs().max() / merged.abs().max()) < 1e-6
    )  # gemma2's float32 softmax


@pytest.mark.parametrize("family", ["olmo2", "opt", "opt_post", "bert"])
def test_ten_percent_of_a_scale_in_an_unusual_place_is_seen(family: str) -> None:
    """A wrong scale on an input, an activation or a dropout is refused."""
    model: Any = tiny(family)
    retrofit(model, paper())
    randomize_(model)
    certify(model)
    names = build(model).parts.layers[1]
    place = model.get_submodule(names.mlp.module if family == "olmo2" else names.mlp.scale)
    handle = (
        place.register_forward_pre_hook(lambda m, args: (1.1 * args[0], *args[1:]))
        if family == "olmo2"
        else place.register_forward_hook(lambda m, args, out: 1.1 * out)
    )
    with pytest.raises(CertificateError, match=r"reproduce|rule is proven"):
        certify(model)
    handle.remove()
    assert math.isfinite(certify(model).lipschitz)
