"""The merged blocks of LoRA on a constrained model stay within their caps.

A float64 SVD says so.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lip_plugin import (
    LipschitzMuon,
    attach_projection,
    certify,
    falsify,
    project_,
    retrofit,
)
from lip_plugin.config_values import LOGIT_SCALE
from lip_plugin.errors import ConfigError, NonFiniteError, TrainerError, UnsupportedModelError
from lip_plugin.integrations.peft.enforce import (
    merged_block_norms,
    merged_weight,
    project_adapters,
)
from lip_plugin.integrations.peft.layers import lora_layers
from lip_plugin.model.layout import ROW, Layout, Segment
from lip_plugin.model.scales import branch_scale
from lip_plugin.optim.enforce import step_projection_
from tests.support.families import tiny
from tests.support.oracles import paper

peft = pytest.importorskip("peft")
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": "all-linear", "qwen3": "all-linear"}
TOLERANCE = 1e-3  # what the plugin promises; the map itself stays within 1e-4
IDS = torch.arange(48).reshape(4, 12) % 67


def lora(family: str, r: int = 4, **options: Any) -> Any:
    options = {
        "lora_alpha": 2 * r,
        "target_modules": TARGETS[family],
        "fan_in_fan_out": family == "gpt2",
        **options,
    }
    return peft.LoraConfig(r=r, **options)


def adapted(family: str, r: int = 4, w_max: float = 1.0, **options: Any) -> Any:
    base = tiny(family, num_hidden_layers=1)
    retrofit(base, paper(w_max=w_max))
    return peft.get_peft_model(base, lora(family, r, **options))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def exact_worst(model: nn.Module) -> float:
    """The largest RMS->RMS norm over cap of any block of W0 + the sum of s B A.

    It is taken by an SVD from peft's own delta.
    """
    worst = 0.0
    for _, layer in lora_layers(model):
        base = layer.base_layer
        weight = base.weight.detach().double()
        for name in layer.active_adapters:
            weight = weight + layer.get_delta_weight(name).detach().double()
        for segment, blocks in base.layout.views(weight):
            sizes = torch.linalg.svdvals(blocks)[:, 0] * math.sqrt(
                blocks.shape[-1] / blocks.shape[-2]
            )
            worst = max(worst, float(sizes.max()) / segment.cap)
    return worst


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Worst norm over cap after any of the steps."""
    worst = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        worst = max(worst, exact_worst(model))
    return worst


def fill(model: nn.Module, size: float, seed: int = 1) -> None:
    """Random B of the given size in every adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(size * torch.randn(p.shape, generator=generator))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("family", "r", "w_max", "optimizer"),
    [
        ("gpt2", 2, 1.0, "sgd"),
        ("gpt2", 8, 2.0, "muon"),
        ("llama", 8, 1.0, "adamw"),
        ("llama", 2, 1.5, "muon"),
    ],
)
def test_every_merged_block_is_within_its_cap_after_every_step(
    family: str, r: int, w_max: float, optimizer: str
) -> None:
    model = adapted(family, r, w_max)
    if optimizer == "muon":
        chosen: torch.optim.Optimizer = LipschitzMuon(model, lr=0.1, adamw_lr=0.1)
    else:
        cls, lr = {"sgd": (torch.optim.SGD, 30.0), "adamw": (torch.optim.AdamW, 0.1)}[optimizer]
        chosen = cls(trainable(model), lr=lr)
        attach_projection(chosen, model)
    before = model(input_ids=IDS, labels=IDS).loss.item()
    assert train(model, chosen, 50) <= 1 + TOLERANCE
    if optimizer != "sgd":  # at 30.0 it only has to stay in the set
        assert model(input_ids=IDS, labels=IDS).loss.item() < before - 0.01


def test_without_the_projection_the_same_training_leaves_the_caps() -> None:
    model = adapted("gpt2", 8)
    assert train(model, torch.optim.AdamW(trainable(model), lr=0.1), 3) > 1.5


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"lora_alpha": 64}, {"rank_pattern": {"c_fc": 48}}]
)
def test_scaling_and_rank_of_each_layer_are_honoured(options: dict[str, Any]) -> None:
    model = adapted("gpt2", 3, **options)
    fill(model, 0.3)
    step_projection_(model, None, lr=0.0)
    assert exact_worst(model) <= 1 + TOLERANCE


@pytest.mark.parametrize("frozen", [False, True])
def test_several_active_adapters_are_kept_together(frozen: bool) -> None:
    model = adapted("gpt2", 3, w_max=1.3)
    model.add_adapter("second", lora("gpt2", 5, use_rslora=True))
    model.base_model.set_adapter(["default", "second"])
    fill(model, 0.002)
    first = [layer.lora_B["default"].weight for _, layer in lora_layers(model)]
    for weight in first:
        weight.requires_grad_(not frozen)
    kept = [w.detach().clone() for w in first]
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    attach_projection(optimizer, model)
    assert train(model, optimizer, 8) <= 1 + TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True)) is frozen
    assert exact_worst(model) > 0.99  # it did have something to do


def test_fresh_adapters_and_feasible_ones_keep_every_bit() -> None:
    model = adapted("gpt2", w_max=2.0)
    for size in (0.0, 1e-3):
        fill(model, size)
        before = state(model)
        assert project_adapters(model) == 3 * 4 + 3  # heads of q, k, v, and three whole matrices
        assert equal(before, state(model))
        assert exact_worst(model) < 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("size", [0.05, 1.0, 1e6])
def test_break_it_see_it_fail_repair_it(family: str, size: float) -> None:
    model = adapted(family)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "lora_B" not in k}
    fill(model, size)
    assert exact_worst(model) > 1.05
    assert max(b.worst_over_cap for b in merged_block_norms(model)) > 1.05
    step_projection_(model, None, lr=0.0)
    assert exact_worst(model) <= 1 + TOLERANCE
    assert max(b.worst_over_cap for b in merged_block_norms(model)) <= 1 + TOLERANCE
    repaired = state(model)
    assert all(torch.equal(v, repaired[k]) for k, v in frozen.items()), "only B is changed"
    step_projection_(model, None, lr=0.0)
    assert equal(repaired, state(model)), "the projection is idempotent"


def test_dependent_rows_of_a_and_zero_base_weights_have_a_projection() -> None:
    model = adapted("gpt2", 4)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            a = layer.lora_A["default"].weight
            a[1] = a[0]
            a[2] = 0
    layer = model.base_model.model.transformer.h[0].attn.c_proj
    assert not layer.base_layer.weight.any()  # an output map starts at zero
    fill(model, 1.0)
    step_projection_(model, None, lr=0.0)
    assert exact_worst(model) <= 1 + TOLERANCE


def capped_layer(w: Tensor, a: Tensor, b: Tensor, cap: float = 1.0) -> nn.Module:
    """One LoRA layer on one block, in float64, without peft."""
    from lip_plugin.model.layers import constrain_

    base = nn.Linear(w.shape[1], w.shape[0], bias=False).to(w.dtype)
    base.weight.data = w.clone()
    constrain_(base, Layout("rms_to_rms", False, (Segment("up", 0, 1, w.shape[0], cap),)))
    base.weight.requires_grad_(False)
    layer: Any = nn.Module()
    layer.base_layer, layer.scaling, layer.active_adapters = base, {"x": 1.0}, ["x"]
    layer.merged = layer.disable_adapters = False
    for side, value in (("lora_A", a), ("lora_B", b)):
        linear = nn.Linear(value.shape[1], value.shape[0], bias=False).to(value.dtype)
        linear.weight.data = value.clone()
        setattr(layer, side, nn.ModuleDict({"x": linear}))
    return layer


def nearest(w: Tensor, q: Tensor, e: Tensor, c: float) -> Tensor:
    """The nearest E' to E with norm2(w + E' q^T) <= c, in the Frobenius norm.

    By Dykstra's algorithm with full SVDs.
    """
    carry = torch.zeros_like(w)
    for _ in range(2000):
        u, s, v = torch.linalg.svd(w + e @ q.T + carry, full_matrices=False)
        clipped = (u * s.clamp(max=c)) @ v
        carry, e = w + e @ q.T + carry - clipped, (clipped - w) @ q
    return e


@pytest.mark.parametrize(("d_out", "d_in"), [(8, 24), (16, 16), (24, 8)])
@pytest.mark.parametrize("top", [0.7, 1.0])
def test_the_projected_adapter_is_close_to_the_nearest_feasible_one(
    d_out: int, d_in: int, top: float
) -> None:
    small = min(d_out, d_in)
    scale = math.sqrt(d_out / d_in)
    u, _, v = torch.linalg.svd(torch.randn(d_out, d_in, dtype=torch.float64), full_matrices=False)
    w = (u * torch.linspace(0.2, top, small, dtype=torch.float64)) @ v * scale
    a = torch.randn(3, d_in, dtype=torch.float64)
    b = 0.1 * scale * torch.randn(d_out, 3, dtype=torch.float64)
    layer = capped_layer(w, a, b)
    assert project_adapters(nn.Sequential(layer)) == 1
    q, r = torch.linalg.qr(a.T)
    e, moved = b @ r.T, (merged_weight(layer) - w) @ q
    best = nearest(w, q, e, scale)
    assert torch.linalg.matrix_norm(w + moved @ q.T, 2) <= scale * (1 + 1e-4)
    # within 25 % of the optimum's distance (and never further than W0 itself: B = 0 is feasible)
    assert (moved - e).norm() <= 1.25 * (best - e).norm() + 1e-4 * scale
    assert (moved - e).norm() < e.norm()


def test_on_a_base_at_its_caps_adapters_still_learn() -> None:
    """On a base at its caps, adapters still learn.

    Scaling alone leaves a full step no length there. The filter keeps what turns and shrinks.
    """
    model = adapted("gpt2", 4, w_max=1.0)
    heads = merged_block_norms(model)[0]
    assert heads.worst_over_cap > 0.999
    weight = model.base_model.model.transformer.h[0].attn.c_attn.base_layer.weight.detach().double()
    fill(model, 0.05)
    wanted = merged_weight(model.base_model.model.transformer.h[0].attn.c_attn) - weight
    step_projection_(model, None, lr=0.0)
    got = merged_weight(model.base_model.model.transformer.h[0].attn.c_attn) - weight
    assert (got * wanted).sum() > 0.02 * wanted.square().sum()


def test_bfloat16_bases_and_adapters_are_within_what_their_storage_can_tell() -> None:
    base = tiny("llama", num_hidden_layers=1)
    retrofit(base, paper(w_max=1.2))
    base.to(torch.bfloat16)
    model = peft.get_peft_model(base, lora("llama"))
    assert trainable(model)[0].dtype == torch.float32  # peft's own choice
    for dtype in (torch.float32, torch.bfloat16):
        for p in trainable(model):
            p.data = p.data.to(dtype)
        fill(model, 0.5)
        step_projection_(model, None, lr=0.0)
        worst = max(b.worst_over_cap for b in merged_block_norms(model))  # of exact products
        assert 0.5 < worst <= 1 + TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_merging_gives_the_same_function_and_branch_scales_stay(family: str) -> None:
    model = adapted(family, w_max=2.0)
    scales = [branch_scale(m) for m in model.modules() if branch_scale(m) != 1.0]
    assert len(scales) == 2
    fill(model, 0.05)
    step_projection_(model, None, lr=0.0)
    with torch.no_grad():
        apart = model(input_ids=IDS).logits
        weights = {name: merged_weight(layer) for name, layer in lora_layers(model)}
        merged = model.merge_and_unload()
        together = merged(input_ids=IDS).logits
        base_only = tiny(family, num_hidden_layers=1)
        retrofit(base_only, paper(w_max=2.0))
        assert (
            base_only(input_ids=IDS).logits - apart
        ).abs().max() > 1e-4  # the adapters do something
    # float32 logits of size 1, another order of sums, and a factor of LOGIT_SCALE behind them
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-7 * LOGIT_SCALE)
    for name, weight in weights.items():
        stored = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        torch.testing.assert_close(stored.double(), weight, rtol=0, atol=1e-6)
    norms = {b.name: b.worst_over_cap for b in project_(copy.deepcopy(merged))}
    assert max(norms.values()) <= 1 + TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_certificate_reads_the_merged_weights(family: str) -> None:
    model = adapted(family, w_max=2.0)
    fresh = certify(model).log10_lipschitz
    fill(model, 0.1)
    step_projection_(model, None, lr=0.0)
    wrapped, caps = certify(model).log10_lipschitz, certify(model, "caps").log10_lipschitz
    assert fresh < wrapped <= caps + 1e-3
    assert math.log10(falsify(model, restarts=2, steps=10).lower_bound) <= wrapped
    assert certify(model.merge_and_unload()).log10_lipschitz == pytest.approx(wrapped, rel=1e-5)


def test_a_certificate_from_caps_knows_the_caps_of_wrapped_layers() -> None:
    """A certificate from caps knows the caps of wrapped layers.

    peft renames the weight of a wrapped layer, whose cap stays. Only the factors count as they are.
    """
    base = tiny("gpt2", num_hidden_layers=1)
    retrofit(base, paper(biases="drop"))
    model = peft.get_peft_model(base, lora("gpt2", target_modules=["c_fc"]))
    for p in model.get_submodule(
        "base_model.model.transformer.h.0.mlp.c_fc.base_layer"
    ).parameters():
        p.requires_grad_(p.dim() > 1)
    uncapped = [line for line in certify(model, "caps").assumptions if "has no cap" in line]
    assert ["(2 tensors)" in line for line in uncapped] == [True]


def test_adapters_are_saved_and_loaded_on_a_saved_constrained_base(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny("gpt2", num_hidden_layers=1)
    retrofit(base, paper(w_max=1.5))
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, lora("gpt2"))
    fill(model, 0.1)
    step_projection_(model, None, lr=0.0)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(
        again, str(tmp_path / "adapter"), is_trainable=True
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    before = state(loaded)
    optimizer = torch.optim.AdamW(trainable(loaded), lr=0.1)
    attach_projection(optimizer, loaded)
    assert equal(before, state(loaded)), "what is within its caps keeps every bit"
    assert train(loaded, optimizer, 2) <= 1 + TOLERANCE


def test_a_loaded_adapter_above_the_caps_is_brought_within_when_the_projection_is_attached() -> (
    None
):
    model = adapted("gpt2")
    fill(model, 1.0)
    attach_projection(torch.optim.SGD(trainable(model), lr=0.1), model)
    assert exact_worst(model) <= 1 + TOLERANCE


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
            UnsupportedModelError,
            r"h\.0\.attn\.c_attn.*variant of LoRA",
        ),
        ({"use_dora": True}, UnsupportedModelError, r"attn\.c_proj: row 0 of W0 \+ s B A is zero"),
        (
            {"target_modules": ["wte"], "fan_in_fan_out": False},
            UnsupportedModelError,
            "wte.*embedding",
        ),
    ],
)
def test_adapters_without_a_rule_are_refused_by_name(
    change: dict[str, Any], error: type, match: str
) -> None:
    model = adapted("gpt2", **change)
    before = state(model)
    for build in (
        lambda: attach_projection(torch.optim.SGD(trainable(model), lr=0.1), model),
        lambda: LipschitzMuon(model),
        lambda: step_projection_(model, None, lr=0.1),
    ):
        with pytest.raises(error, match=match):
            build()
    assert equal(before, state(model))


def test_tuners_other_than_lora_and_layers_without_a_cap_are_refused() -> None:
    base = tiny("gpt2", num_hidden_layers=1)
    retrofit(base, paper())
    config = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    with pytest.raises(UnsupportedModelError, match="c_attn is wrapped by peft"):
        project_adapters(peft.get_peft_model(base, config))
    layer = capped_layer(torch.eye(4), torch.zeros(2, 4), torch.zeros(4, 2))
    layer.base_layer = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModelError, match="0: LoRA on Linear, which has no cap"):
        project_adapters(nn.Sequential(layer))


def test_a_base_above_its_cap_is_refused_with_its_excess_and_project_is_the_cure() -> None:
    model = adapted("gpt2")
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        layer.base_layer.weight.mul_(1.25)
    before = state(model)
    with pytest.raises(
        ConfigError, match=r"c_fc: the base weight's up block is 1\.25 times its cap 1, .*project_"
    ):
        attach_projection(torch.optim.SGD(trainable(model), lr=0.1), model)
    assert equal(before, state(model))
    project_(model)
    attach_projection(torch.optim.SGD(trainable(model), lr=0.1), model)


def test_non_finite_factors_and_merged_adapters_are_refused_and_nothing_changes() -> None:
    model = adapted("gpt2")
    fill(model, 1.0)
    model.merge_adapter()
    with pytest.raises(TrainerError, match=r"unmerge_adapter\(\)"):
        step_projection_(model, None, lr=0.1)
    model.unmerge_adapter()
    bad = model.base_model.model.transformer.h[0].mlp.c_fc.lora_A["default"].weight
    with torch.no_grad():
        bad[0, 0] = math.nan
    before = state(model)
    with pytest.raises(NonFiniteError, match=r"mlp\.c_fc\.lora_A\.default"):
        step_projection_(model, None, lr=0.1)
    bad.data[0, 0] = 0.0
    before[next(k for k in before if k.endswith("mlp.c_fc.lora_A.default.weight"))][0, 0] = 0.0
    assert equal(before, state(model))


def test_the_order_retrofit_after_peft_is_refused() -> None:
    base = tiny("gpt2", num_hidden_layers=1)
    model = peft.get_peft_model(base, lora("gpt2"))
    for wrong in (base, model):
        with pytest.raises(UnsupportedModelError, match=r"Order: retrofit.*get_peft_model"):
            retrofit(wrong, paper())


def test_frozen_weights_are_decomposed_only_where_needed_and_again_after_they_were_written_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lip_plugin.integrations.peft import nearest as peft_blocks

    seen: list[str] = []
    real = peft_blocks._spectrum
    monkeypatch.setattr(peft_blocks, "_spectrum", lambda *a: (seen.append(a[0].role), real(*a))[1])
    model = adapted("gpt2")
    project_adapters(model)
    assert seen == [], "adapters that change nothing ask for no eigenvectors"
    for again in range(2):
        fill(model, 0.2)
        project_adapters(model)
        assert sorted(seen) == ["down", "k", "out", "q", "up", "v"], again
    layer = model.base_model.model.transformer.h[0].mlp.c_fc.base_layer
    with torch.no_grad():
        layer.weight.mul_(0.5)
    fill(model, 0.9)
    project_adapters(model)
    assert seen[6:] == ["up"]


def test_importing_the_integration_imports_neither_peft_nor_transformers() -> None:
    code = (
        "import sys, lip_plugin.integrations.peft.enforce; "
        "assert not {'peft', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_row_layouts_are_never_taken_for_matrices() -> None:
    model = adapted("gpt2")
    assert all(layer.base_layer.layout.norm != ROW for _, layer in lora_layers(model))
