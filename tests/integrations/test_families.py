"""Every family keeps everything that a retrofit promises about its parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lip_plugin import LipschitzMuon, release, retrofit
from lip_plugin.errors import ConfigError
from lip_plugin.integrations.huggingface.families import HF_ARCHITECTURES
from lip_plugin.model.architecture import families
from lip_plugin.model.layers import Constrained, constrained_modules
from lip_plugin.model.scales import ConstantScale
from lip_plugin.surgery.state import find_retrofit
from tests.support.families import CLASSIFIERS, FAMILIES, inputs_for, tiny
from tests.support.oracles import (
    Recipe,
    fingerprint,
    logits_of,
    loss_of,
    paper,
    randomize_,
    retrofitted,
    table_of,
    worst_over_cap,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
with_tables = pytest.mark.parametrize("family", [f for f in FAMILIES if f not in CLASSIFIERS])


def test_every_family_that_is_known_is_driven_by_this_table():
    assert set(families()) == {a.name for a in HF_ARCHITECTURES} | {"nanogpt"}
    assert set(FAMILIES) == set(families())


@every_family
def test_only_the_norms_leave_the_state_dict(family):
    model = tiny(family)
    before, names = list(model.state_dict()), table_of(model)
    gone = tuple(f"{name}." for name in names.norms())
    retrofit(model, paper())
    assert list(model.state_dict()) == [k for k in before if not k.startswith(gone)]
    assert all(isinstance(model.get_submodule(n), ConstantScale) for n in names.norms())


@every_family
def test_the_parameters_are_the_very_same_objects(family):
    model = tiny(family)
    before = dict(model.named_parameters(remove_duplicate=False))
    cls, dtype = type(model), next(model.parameters()).dtype
    head, unused = f"{table_of(model).head}.weight", table_of(model).architecture.unused
    was_tied = before[head] is next(model.parameters())
    retrofit(model, paper())
    assert type(model) is cls
    for name, p in model.named_parameters(remove_duplicate=False):
        assert p.dtype == dtype
        if was_tied and name in (head, *unused):
            assert p is not before[name]  # the head got its own copy
        else:
            assert p is before[name]


@with_tables
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_untied_by_an_equal_copy(family, tied):
    if family == "nanogpt":
        model = tiny(family)
        if not tied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    else:
        model = tiny(family, tie_word_embeddings=tied)
    names = table_of(model)
    head, tokens = model.get_submodule(names.head), model.get_submodule(names.architecture.tokens)
    assert (head.weight is tokens.weight) == tied
    original, value = head.weight, head.weight.detach().clone()
    report = retrofit(model, paper(init="keep"))
    assert head.weight is not tokens.weight
    assert torch.equal(head.weight, value)
    assert (head.weight is original) == (not tied)
    assert tokens.weight.requires_grad
    assert ("untied" in str(report)) == tied


@every_family
def test_twice_equals_once(family):
    model = tiny(family)
    config = paper(w_max=1.5)
    assert len(retrofit(model, config)) > 20
    before = fingerprint(model)
    report = retrofit(model, config)
    assert len(report) == 0
    assert str(report) == "nothing to change"
    after = fingerprint(model)
    assert all(torch.equal(after["tensors"][k], v) for k, v in before["tensors"].items())
    assert after["modules"] == before["modules"]
    assert after["identities"] == before["identities"]


@every_family
def test_another_config_on_a_retrofitted_model_is_refused(family):
    model = tiny(family)
    retrofit(model, paper())
    before = fingerprint(model)
    with pytest.raises(ConfigError, match="release"):
        retrofit(model, paper(w_max=2.0))
    assert fingerprint(model)["modules"] == before["modules"]


@every_family
def test_release_gives_plain_layers_and_the_same_logits_to_the_bit(family):
    plain = {
        n: type(m) for n, m in tiny(family).named_modules() if list(m.parameters(recurse=False))
    }
    model, x = retrofitted(family), inputs_for(family)
    expected, capped = logits_of(model, x), [n for n, _ in constrained_modules(model)]
    assert {n for n, m in model.named_modules() if n in plain and hasattr(m, "weight")} <= set(
        capped
    )
    assert [n for n, _ in release(model).changes] == capped
    assert not list(constrained_modules(model))
    assert not any(isinstance(m, Constrained) for m in model.modules())
    assert find_retrofit(model) is None
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            assert type(module) is plain[name]
    assert torch.equal(logits_of(model, x), expected)
    assert len(release(model)) == 0


@every_family
def test_a_released_model_can_be_retrofitted_again_and_keeps_its_function(family):
    model, x = retrofitted(family), inputs_for(family)
    expected, modules = logits_of(model, x), fingerprint(model)["modules"]
    release(model)
    assert len(retrofit(model, paper())) > 0
    assert torch.equal(logits_of(model, x), expected)  # the weights are trained: no fresh init
    assert [m[:3] for m in fingerprint(model)["modules"]] == [m[:3] for m in modules]
    release(model)
    retrofit(model, paper(residual=0.3))
    expected = Recipe(family, model, residual=0.3)(x)
    assert torch.allclose(logits_of(model, x), expected, rtol=1e-4, atol=1e-4)  # float32


@every_family
def test_a_fresh_model_starts_orthogonal_at_its_caps_with_zero_output_maps(family):
    for cap in (0.5, 1.0, 3.0):
        model = tiny(family)
        retrofit(model, paper(w_max=cap))
        for name, module in constrained_modules(model):
            for segment, blocks in module.layout.views(module.weight.detach().double()):
                if module.layout.norm == "row":
                    sizes = blocks.square().mean(-1).sqrt()
                    # float32 entries: the RMS norm of a row is right to a few 1e-7
                    assert torch.allclose(
                        sizes, torch.full_like(sizes, segment.cap), rtol=1e-5, atol=0
                    )
                    continue
                values = torch.linalg.svdvals(blocks) * math.sqrt(
                    blocks.shape[-1] / blocks.shape[-2]
                )
                if segment.role in ("out", "down"):
                    assert not blocks.any(), name
                else:
                    target = min(1.0, segment.cap)
                    assert torch.allclose(
                        values, torch.full_like(values, target), rtol=1e-5, atol=0
                    ), name
        assert worst_over_cap(model) <= 1.0  # the start needs no tolerance
        assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))


@every_family
def test_init_keep_leaves_every_weight(family):
    model = tiny(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    retrofit(model, paper(init="keep"))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@every_family
@pytest.mark.parametrize("granularity", ["head", "matrix"])
def test_blocks_are_heads_or_whole_matrices(family, granularity):
    model = tiny(family)
    if family.startswith("gpt_neox") and granularity == "matrix":
        with pytest.raises(ConfigError, match="interleaved"):
            retrofit(model, paper(granularity=granularity))
        return
    retrofit(model, paper(granularity=granularity))
    names = table_of(model)
    d_head = 16 if family.startswith(("qwen3", "gemma")) else 8
    kv = 2 if hasattr(model.config, "num_key_value_heads") else 4
    heads = {"q": 4, "k": kv, "v": kv}
    for layer in names.layers:
        found = {}
        for name in layer.attention.linears.values():
            module = model.get_submodule(name)
            assert module.layout.covers(module.weight)
            assert module.layout.transposed == family.startswith("gpt2")
            for s in module.layout.segments:
                found[s.role] = (found.get(s.role, (0, 0))[0] + s.count, s.d_out)
        for role, count in heads.items():
            expected = (count, d_head) if granularity == "head" else (1, count * d_head)
            assert found[role] == expected
        assert found["out"] == (1, 32)
    other = [
        s for n, m in constrained_modules(model) for s in m.layout.segments if s.role not in heads
    ]
    assert all(s.count == 1 for s in other)


@every_family
def test_overrides_name_layers_by_suffix_and_the_longest_wins(family):
    model = tiny(family)
    names = table_of(model)
    first, second = (layer.mlp.linears["down"] for layer in names.layers)
    suffix = ".".join(
        first.split(".")[-3 if "output" in first else -2 :]
    )  # bert has two output.dense
    tokens = names.tables()[0][1]
    retrofit(
        model,
        paper(w_max=2.0, overrides={suffix: 0.5, second: 0.25, names.head: 7.0, tokens: 0.1}),
    )
    caps = {n: {s.cap for s in m.layout.segments} for n, m in constrained_modules(model)}
    assert caps[first] == {0.5}
    assert caps[second] == {0.25}
    assert caps[names.head] == {7.0}
    assert caps[tokens] == {0.1}
    others = set(caps) - {first, second, names.head, names.architecture.patches}
    others -= {name for _, name in names.tables()}
    assert all(caps[n] == {2.0} for n in others)


@every_family
def test_embedding_tables_share_their_bound(family):
    model = tiny(family)
    retrofit(model, paper(embedding_max=0.8))
    names = table_of(model)
    layouts = {n: m.layout for n, m in constrained_modules(model)}
    caps = {role: layouts[name].segments[0].cap for role, name in names.tables()}
    if family == "vit":  # a patch and a position, or the first row and its position
        assert layouts[names.architecture.patches].segments[0].cap == caps["first"]
    caps = list(caps.values())
    assert sum(caps) == pytest.approx(0.8, rel=1e-15)
    assert len(set(caps)) == 1


@every_family
def test_dropped_biases_are_zero_and_stay_so(family):
    model = (
        tiny(family, attention_bias=True) if family.startswith(("llama", "qwen3")) else tiny(family)
    )
    randomize_(model)
    retrofit(model, paper(biases="drop", init="keep"))
    unused = table_of(model).architecture.unused
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias") and n not in unused}
    none = ("mistral", "granite", "phi3", "gemma2", "gemma3", "olmo2")
    assert bool(biases) == (not family.startswith(none))
    optimizer, x = LipschitzMuon(model), inputs_for(family)
    for _ in range(3):
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(p.requires_grad or p.any() for p in biases.values())


@every_family
def test_keeping_the_norms_changes_no_logit(family):
    model, x = randomize_(tiny(family)), inputs_for(family)
    expected, keys = logits_of(model, x), list(model.state_dict())
    retrofit(model, paper(norms="keep"))
    assert torch.equal(logits_of(model, x), expected)
    assert list(model.state_dict()) == keys
    assert not any(isinstance(m, ConstantScale) for m in model.modules())
    assert len(list(constrained_modules(model))) > 8
