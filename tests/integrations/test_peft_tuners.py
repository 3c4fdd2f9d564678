"""What layers multiply with stays within caps and budgets after every step.

This holds for every tuner, layout, dtype and optimizer.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from lip_plugin import (  # noqa: E402
    LipschitzMuon,
    attach_projection,
    certify,
    constrain_adapters,
    falsify,
    project_,
)
from lip_plugin.errors import UnsupportedModelError  # noqa: E402
from lip_plugin.integrations.peft.enforce import merged_block_norms, project_adapters  # noqa: E402
from lip_plugin.integrations.peft.layers import merged_weight, wrapped_layers  # noqa: E402
from tests.support.peft_models import (  # noqa: E402
    IDS,
    TOLERANCE,
    adapted,
    base_matrix,
    base_of,
    disturb,
    effective,
    equal,
    state,
    trainable,
    tuner,
    untouched,
    worst_change,
    worst_merged,
)

FAMILIES = [
    "gpt2",
    "gpt_neox",
    "phi3",
    "llama",
]  # Conv1D fused, interleaved, fused rows twice, grouped heads
LOW_RANK = ["lora", "rslora", "dora"]


def optimizer_for(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "muon":
        return LipschitzMuon(model, lr=0.1, adamw_lr=0.1)
    cls, lr = {"sgd": (torch.optim.SGD, 30.0), "adamw": (torch.optim.AdamW, 0.1)}[kind]
    chosen: torch.optim.Optimizer = cls(trainable(model), lr=lr)
    attach_projection(chosen, model)
    return chosen


def worst_in_training(
    model: Any, optimizer: torch.optim.Optimizer, worst: Any, steps: int = 6
) -> float:
    found = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        found = max(found, worst(model))
    return found


LINEAR = FAMILIES[1:]  # peft has OFT and HRA on Linear layers only


@pytest.mark.parametrize(
    ("kind", "family"),
    [(k, f) for k in LOW_RANK for f in FAMILIES]
    + [(k, f) for k in ("oft", "coft") for f in LINEAR],
)
def test_the_weight_that_is_read_is_the_one_that_the_layer_multiplies_with(
    kind: str, family: str
) -> None:
    model = adapted(kind, family).double()
    disturb(model, 0.3)
    for name, layer, _ in wrapped_layers(model):
        read = merged_weight(layer)
        read = (
            read.T
            if base_matrix(layer).shape != read.shape or "Conv1D" in str(layer.base_layer)
            else read
        )
        torch.testing.assert_close(read, effective(layer), rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("apply_gs", [False, True])
def test_hra_is_read_as_it_computes(apply_gs: bool) -> None:
    model = adapted("hra", "llama", apply_GS=apply_gs).double()
    disturb(model, 0.3)
    for _, layer, _ in wrapped_layers(model):
        torch.testing.assert_close(merged_weight(layer), effective(layer), rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", LOW_RANK)
def test_merged_blocks_are_within_their_caps_after_every_step(
    kind: str, family: str, optimizer: str
) -> None:
    model = adapted(kind, family, w_max=1.0 if kind == "dora" else 1.1)
    before = state(model)
    assert worst_in_training(model, optimizer_for(optimizer, model), worst_merged) <= 1 + TOLERANCE
    assert not equal(before, state(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", LOW_RANK)
def test_merged_blocks_are_within_their_caps_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    model = adapted(kind, "llama", w_max=1.05, dtype=dtype)
    for p in trainable(model):
        p.data = p.data.to(dtype)
    for size in (0.02, 0.3, 3.0):
        disturb(model, size)
        assert size < 0.1 or worst_merged(model) > 1 + TOLERANCE
        project_(model)
        assert worst_merged(model) <= 1 + TOLERANCE
        assert max(b.worst_over_cap for b in merged_block_norms(model)) <= 1 + TOLERANCE


@pytest.mark.parametrize("kind", ["oft", "coft", "hra"])
@pytest.mark.parametrize("family", LINEAR)
def test_oft_and_hra_keep_every_blocks_norm_by_themselves(kind: str, family: str) -> None:
    model = adapted(kind, family)
    fresh = worst_merged(model)
    optimizer = optimizer_for("adamw", model)
    assert worst_in_training(model, optimizer, worst_merged) <= 1 + TOLERANCE
    assert worst_merged(model) == pytest.approx(fresh, rel=1e-5)  # float32 rotations
    moved = max(
        float((effective(la) - base_matrix(la)).abs().max()) for _, la, _ in wrapped_layers(model)
    )
    assert moved > 0.01
    assert (
        math.log10(falsify(model, restarts=1, steps=3).lower_bound)
        <= certify(model).log10_lipschitz
    )


def test_oft_by_a_truncated_series_is_refused_because_it_lengthens() -> None:
    model = peft.get_peft_model(base_of("llama"), tuner("oft", "llama", use_cayley_neumann=True))
    disturb(model, 0.3)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    grown = torch.linalg.matrix_norm(effective(layer), 2) / torch.linalg.matrix_norm(
        base_matrix(layer), 2
    )
    assert grown > 1.05
    for call in (lambda: project_adapters(model), lambda: certify(model)):
        with pytest.raises(UnsupportedModelError, match="use_cayley_neumann=False"):
            call()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_changes_of_an_untouched_base_are_within_their_budget_after_every_step(
    kind: str, family: str, relative: bool, optimizer: str
) -> None:
    model = untouched(kind, family)
    report = constrain_adapters(model, 0.1, relative=relative)
    assert len(report) == len(list(wrapped_layers(model)))
    assert worst_in_training(model, optimizer_for(optimizer, model), worst_change) <= 1 + TOLERANCE
    assert worst_change(model) > 0.5  # the budget was in the way


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_capped_base_may_have_a_budget_too_and_both_hold(kind: str, family: str) -> None:
    model = adapted(kind, family)
    constrain_adapters(model, 0.2)
    disturb(model, 0.5)
    assert min(worst_change(model), worst_merged(model)) > 1.05
    project_(model)
    assert worst_change(model) <= 1 + TOLERANCE
    assert worst_merged(model) <= 1 + TOLERANCE
    kept = state(model)
    project_adapters(model)
    assert equal(kept, state(model)), "what is within keeps every bit"
    assert worst_in_training(model, optimizer_for("adamw", model), worst_change, 3) <= 1 + TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_budgets_hold_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    model = untouched(kind, "llama").to(dtype)
    constrain_adapters(model, 0.3)
    for size in (0.1, 3.0):
        disturb(model, size)
        project_(model)
        assert 0.2 < worst_change(model) <= 1 + TOLERANCE


def test_clipping_is_the_nearest_change_within_the_budget() -> None:
    """Clipping is the nearest change within the budget in the Frobenius norm, A untouched.

    The SVD of s B A itself says so.
    """
    model = untouched("lora", "llama").double()
    constrain_adapters(model, 0.1)
    disturb(model, 0.2)
    changes = {n: effective(layer) - base_matrix(layer) for n, layer, _ in wrapped_layers(model)}
    kept = {k: v for k, v in state(model).items() if "lora_A" in k}
    project_adapters(model)
    for name, layer, _ in wrapped_layers(model):
        got = effective(layer) - base_matrix(layer)
        for s in layer.__dict__["lip_budget"].segments:
            for block, before in zip(
                *(
                    m[s.start : s.stop].unflatten(0, (s.count, s.d_out))
                    for m in (got, changes[name])
                ),
                strict=True,
            ):
                u, sizes, v = torch.linalg.svd(before, full_matrices=False)
                nearest = (u * sizes.clamp(max=s.cap * math.sqrt(s.d_out / before.shape[1]))) @ v
                torch.testing.assert_close(block, nearest, rtol=0, atol=1e-9, msg=name)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept.items())


def test_the_certificate_of_an_adapted_model_is_that_of_the_merged_one() -> None:
    for kind, family in (("dora", "gpt2"), ("oft", "llama")):
        model = adapted(kind, family, w_max=1.5)
        disturb(model, 0.1)
        project_(model)
        apart = certify(model).log10_lipschitz
        assert math.log10(falsify(model, restarts=1, steps=3).lower_bound) <= apart
        assert certify(model.merge_and_unload()).log10_lipschitz == pytest.approx(apart, rel=1e-5)


def test_muon_moves_the_sum_by_its_rate_whatever_rank_and_alpha_are() -> None:
    """The first step moves B by lr in the RMS->RMS norm of each block, and A not at all."""
    for r, alpha in ((2, 1), (8, 64)):
        model = adapted("lora", "gpt2", w_max=3.0, r=r, lora_alpha=alpha)
        optimizer = LipschitzMuon(model, lr=0.02)
        before = {n: effective(layer) for n, layer, _ in wrapped_layers(model)}
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        for name, layer, _ in wrapped_layers(model):
            moved = effective(layer) - before[name]
            for s in layer.base_layer.layout.segments:
                blocks = moved[s.start : s.stop].unflatten(0, (s.count, s.d_out))
                sizes = torch.linalg.svdvals(blocks)[:, 0] * math.sqrt(
                    blocks.shape[-1] / blocks.shape[-2]
                )
                assert (sizes <= 0.02 * (1 + 2e-3)).all(), name
                assert (sizes >= 0.02 * 0.5).all(), name  # A's smaller directions count less


def test_hostile_factors_are_held_as_well() -> None:
    """Hostile factors are held as well.

    Rows of A and columns of B span ten orders of magnitude or depend on each other, ranks are above
    the width, and magnitudes are negative.
    """
    for trial in range(24):
        generator = torch.Generator().manual_seed(trial)
        kind, family, r = LOW_RANK[trial % 3], FAMILIES[trial % 4], (1, 2, 4, 40, 64)[trial % 5]
        capped = trial % 2 == 0
        model = (
            adapted(kind, family, w_max=(1.0, 1.0001, 1.3)[trial % 3], r=r)
            if capped
            else untouched(kind, family, r=r)
        )
        if not capped or trial % 3 == 0:
            constrain_adapters(model, (1e-4, 0.1, 2.0)[(trial // 5) % 3], relative=not capped)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                if "lora_A" in name:
                    p.copy_(noise * 10 ** (torch.rand(len(p), 1, generator=generator) * 10 - 6))
                    if r > 2:
                        p[1] = p[0] * (1 + 1e-7)
                elif "lora_B" in name:
                    p.copy_(noise * 10 ** (torch.rand(1, p.shape[1], generator=generator) * 12 - 8))
                elif "magnitude" in name:
                    p.mul_(1 + 3 * noise)
        try:
            project_adapters(model)
        except UnsupportedModelError as error:
            assert "DoRA divides" in str(error)  # noqa: PT017
            continue
        assert max(b.worst_over_cap for b in merged_block_norms(model)) <= 1 + TOLERANCE, (
            trial,
            kind,
            family,
            r,
        )
