"""LipschitzMuon is in the set after every step, with steps of known size.

It resumes exactly, and its rates are proportional.
"""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from lip_plugin import LipschitzConfig, LipschitzMuon, project_, retrofit
from lip_plugin.config_values import METHOD_NAMES
from lip_plugin.errors import (
    ConfigError,
    NonFiniteError,
    NotRetrofittedError,
    UnsupportedModelError,
)
from lip_plugin.model.batches import batches
from lip_plugin.model.layers import constrained_modules
from lip_plugin.optim.groups import param_groups
from tests.support.families import FAMILIES, inputs_for, tiny
from tests.support.oracles import (
    CAP_TOLERANCE,
    assert_unchanged,
    fingerprint,
    loss_of,
    paper,
    randomize_,
    worst_over_cap,
)

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 19}


def small(family: str, config: LipschitzConfig | None = None) -> nn.Module:
    plain = family.startswith(("gpt2", "nanogpt", "distilbert"))
    fields = {} if plain else {"num_key_value_heads": 1, "intermediate_size": 24}
    if family.startswith("qwen3"):
        fields["head_dim"] = 8
    model = tiny(family, **SMALL, **fields)
    retrofit(model, config or paper())
    return model


def text(tokens: int = 16) -> torch.Tensor:
    return torch.arange(tokens).remainder(7).repeat(2, 1)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    after=None,
    autocast: bool = False,
) -> list:
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, inputs_for("vit") if "ViT" in type(model).__name__ else text())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if after is not None:
            after()
    return losses


def adversarial_gradients_(model: nn.Module, step: int) -> None:
    """Gradients that push norms up hardest.

    They are one direction for ever, the weight's own, of rank one, huge, tiny, or noise.
    """
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        kind = step % 6 if step > 60 else 0
        if kind == 0:
            g = -torch.ones_like(p)
        elif kind == 1:
            g = -p.detach().clone()
        elif kind == 2 and p.dim() == 2:
            g = torch.randn(p.shape[0], 1, generator=generator) * torch.randn(
                p.shape[1], generator=generator
            )
        elif kind == 3:
            g = 1e30 * torch.randn(p.shape, generator=generator)
        elif kind == 4:
            g = 1e-30 * torch.randn(p.shape, generator=generator)
        else:
            g = torch.randn(p.shape, generator=generator)
        p.grad = g


def stress(family: str, method: str, lr: float, steps: int) -> None:
    """Take steps with adversarial gradients, with a float64 SVD of every block after each."""
    model = small(family, paper(method=method, w_max=1.2, overrides={"lm_head": 0.7}))
    optimizer = LipschitzMuon(model, lr=lr)
    worst = []
    for step in range(steps):
        adversarial_gradients_(model, step)
        optimizer.step()
        worst.append(worst_over_cap(model))
    assert max(worst) <= 1.0 + CAP_TOLERANCE
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert max(worst[-10:]) > 0.5  # the caps were really reached: the test can fail


ALL = [(family, method) for family in ("gpt2", "llama") for method in METHOD_NAMES]
QUICK = [(("gpt2", "llama")[i % 2], method) for i, method in enumerate(METHOD_NAMES)] + [
    ("llama", "soft_cap")
]


@pytest.mark.parametrize(("family", "method"), QUICK)
def test_every_block_is_within_its_cap_after_each_of_200_adversarial_steps(family, method):
    stress(family, method, lr=0.05, steps=200)


@pytest.mark.parametrize(("family", "method"), QUICK)
def test_every_block_is_within_its_cap_at_rates_above_the_cap(family, method):
    stress(family, method, lr=3.0, steps=70)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.005, 0.05, 0.3, 3.0])
@pytest.mark.parametrize(("family", "method"), ALL)
def test_every_method_holds_at_every_rate(family, method, lr):
    stress(family, method, lr, steps=400)


@pytest.mark.parametrize(
    ("family", "autocast"),
    [("gpt2", False), ("llama", True)],
    ids=["gpt2-float32", "llama-bf16 autocast"],
)
def test_every_block_is_within_its_cap_after_each_of_200_training_steps(family, autocast):
    model = small(family)
    worst = []
    losses = train(
        model,
        LipschitzMuon(model, lr=0.2),
        200,
        lambda: worst.append(worst_over_cap(model)),
        autocast,
    )
    assert max(worst) <= 1.0 + CAP_TOLERANCE
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_holds_every_family_over_200_training_steps(family, method, autocast):
    model = small(family, paper(method=method, w_max=1.1))
    worst = []
    train(
        model,
        LipschitzMuon(model, lr=0.3),
        200,
        lambda: worst.append(worst_over_cap(model)),
        autocast,
    )
    assert max(worst) <= 1.0 + CAP_TOLERANCE


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.4])
def test_weight_decay_up_to_the_inverse_rate_still_holds_the_caps(decay):
    model = small("gpt2")
    optimizer = LipschitzMuon(model, lr=2.5, weight_decay=decay)
    for step in range(40):
        adversarial_gradients_(model, step)
        optimizer.step()
        assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE


def test_a_decay_that_would_turn_the_weights_around_is_refused_before_anything_is_changed():
    model = small("gpt2")
    optimizer = LipschitzMuon(model, lr=2.5, weight_decay=0.5)
    adversarial_gradients_(model, 1)
    before = fingerprint(model)
    with pytest.raises(ConfigError, match="weight_decay"):
        optimizer.step()
    assert_unchanged(model, before)


def test_a_missing_projection_would_be_seen():
    """A missing projection would be seen by the tests above.

    Without a cap in the layouts the same gradients leave the set.
    """
    model = small("gpt2")
    groups = param_groups(model, 0.05, 0.05, 3e-3)
    for group in groups:
        group["layouts"] = [
            (n, t, tuple((*s[:4], None) for s in rest)) for n, t, rest in group["layouts"]
        ]
    optimizer = LipschitzMuon(groups)
    for step in range(30):
        adversarial_gradients_(model, step)
        optimizer.step()
    assert worst_over_cap(model) > 1.3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("lr", [1e-3, 0.05, 0.7])
def test_a_block_moves_by_at_most_lr_and_not_by_much_less(family, lr):
    # caps far away, so that the projection has nothing to do
    model = small(family, paper(w_max=1e3, embedding_max=1e3, init="keep"))
    optimizer = LipschitzMuon(model, lr=lr)
    for step in (61, 62, 63, 65, 66):
        before = {n: m.weight.detach().double().clone() for n, m in constrained_modules(model)}
        adversarial_gradients_(model, step)
        optimizer.step()
        for name, module in constrained_modules(model):
            moved = module.weight.detach().double() - before[name]
            rounding = 2.0**-23 * float(before[name].abs().max() + lr) * math.sqrt(moved.numel())
            for _, blocks in module.layout.views(moved):
                if module.layout.norm == "row":
                    sizes = blocks.square().mean(-1).sqrt()
                else:
                    sizes = torch.linalg.svdvals(blocks)[..., 0] * math.sqrt(
                        blocks.shape[-1] / blocks.shape[-2]
                    )
                assert float(sizes.max()) <= lr * (1 + 1e-5) + rounding, name
                assert float(sizes.min()) >= 0.7 * lr - rounding, (
                    name
                )  # five steps end in [0.75, 1]


def test_rows_that_were_not_looked_up_do_not_move():
    model = small("gpt2")
    optimizer = LipschitzMuon(model, lr=0.1)
    seen = text().unique()
    unseen = [i for i in range(SMALL["vocab_size"]) if i not in seen]
    before = model.transformer.wte.weight.detach().clone()
    train(model, optimizer, 5)  # several steps: momentum must not move them either
    after = model.transformer.wte.weight.detach()
    assert torch.equal(after[unseen], before[unseen])
    assert bool((after[seen] != before[seen]).any(-1).all())


def test_parameters_without_gradient_keep_every_bit():
    model = small("llama")
    optimizer = LipschitzMuon(model)
    frozen = model.model.layers[0].mlp.up_proj.weight
    train(model, optimizer, 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss_of(model, text()).backward()
    frozen.grad = None
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(before) - {"model.layers.0.mlp.up_proj.weight"}
    for p in model.parameters():
        p.grad = None
    after = fingerprint(model)
    optimizer.step()  # nothing to do is no error
    assert_unchanged(model, after)


def test_frozen_parameters_are_not_in_the_groups():
    model = small("gpt2")
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    optimizer = LipschitzMuon(model)
    ours = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert ours == {id(p) for p in model.parameters() if p.requires_grad}
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    train(model, optimizer, 2)
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, before)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match="gradient"):
        LipschitzMuon(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_the_group_of_its_kind(family):
    model = small(family)
    optimizer = LipschitzMuon(model, lr=0.1, embedding_lr=0.2, adamw_lr=0.001)
    kinds = {id(p): g["kind"] for g in optimizer.param_groups for p in g["params"]}
    layouts = {id(m.weight): m.layout.norm for _, m in constrained_modules(model)}
    for name, p in model.named_parameters():
        expected = {"rms_to_rms": "matrix", "row": "row", None: "adamw"}[layouts.get(id(p))]
        assert kinds.get(id(p)) == (expected if p.requires_grad else None), name
    rates = {g["kind"]: g["lr"] * g["lr_ratio"] for g in optimizer.param_groups}
    expected = {"matrix": 0.1, "row": 0.2, "adamw": 0.001}
    assert rates == {k: pytest.approx(expected[k], rel=1e-15) for k in rates}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["soft_cap", "hard_cap", "spectral_hammer"])
def test_saved_and_restored_it_goes_on_to_the_last_bit(family, method):
    config = paper(method=method, w_max=0.9)
    model = small(family, config)
    optimizer = LipschitzMuon(model, lr=0.15, embedding_lr=0.1, momentum=0.9, weight_decay=0.01)
    train(model, optimizer, 5)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, 5)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    torch.manual_seed(99)
    other = small(family, config)
    other.load_state_dict(saved["model"])
    resumed = LipschitzMuon(other, lr=0.5)  # whatever it was made with, the saved state wins
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 5)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    one, two = optimizer.state_dict(), resumed.state_dict()
    assert one["param_groups"] == two["param_groups"]
    for index, state in one["state"].items():
        assert all(torch.equal(v, two["state"][index][k]) for k, v in state.items())


def test_the_state_is_one_momentum_per_weight_and_two_moments_per_bias():
    model = small("gpt2")
    optimizer = LipschitzMuon(model)
    train(model, optimizer, 1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            expected = (
                {"momentum"} if group["kind"] != "adamw" else {"step", "exp_avg", "exp_avg_sq"}
            )
            assert set(optimizer.state[p]) == expected
            assert all(v.dtype == torch.float32 for v in optimizer.state[p].values())


def test_one_scheduler_moves_all_rates_in_proportion():
    model = small("gpt2")
    optimizer = LipschitzMuon(model, lr=0.1, embedding_lr=0.3, adamw_lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    first = [g["lr"] * g["lr_ratio"] for g in optimizer.param_groups]
    for step in range(1, 5):
        train(model, optimizer, 1)
        scheduler.step()
        now = [g["lr"] * g["lr_ratio"] for g in optimizer.param_groups]
        assert now == [pytest.approx(rate / (1 + step), rel=1e-12) for rate in first]
    # and a loop that writes one number into every group, as nanoGPT's does, keeps the proportions
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    now = [g["lr"] * g["lr_ratio"] for g in optimizer.param_groups]
    assert now == [pytest.approx(rate / 2, rel=1e-12) for rate in first]


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_each_kind_moves_by_its_own_rate(factor):
    """Each kind of parameter moves by its own rate.

    The first step of AdamW moves a bias by its rate, and a row by embedding_lr in RMS norm.
    """
    model = small("gpt2", paper(w_max=1e3, embedding_max=1e3, init="keep"))
    optimizer = LipschitzMuon(model, lr=0.1, embedding_lr=0.3, adamw_lr=0.01)
    for group in optimizer.param_groups:
        group["lr"] *= factor
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adversarial_gradients_(model, 65)
    optimizer.step()
    moved = {n: (p.detach() - before[n]).double() for n, p in model.named_parameters()}
    bias = moved["transformer.h.0.mlp.c_fc.bias"].abs()
    assert torch.allclose(bias, torch.full_like(bias, 0.01 * factor), rtol=1e-3)
    rows = moved["transformer.wte.weight"].square().mean(-1).sqrt()
    assert torch.allclose(rows, torch.full_like(rows, 0.3 * factor), rtol=1e-3)
    head = torch.linalg.svdvals(moved["lm_head.weight"])[0] * math.sqrt(16 / 19)
    assert 0.7 * 0.1 * factor <= float(head) <= 0.1 * factor * (1 + 1e-3)  # float32 differences


def test_a_rate_of_zero_by_a_schedule_moves_nothing():
    model = small("llama")
    optimizer = LipschitzMuon(model)
    train(model, optimizer, 3)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = fingerprint(model)
    train(model, optimizer, 1)
    after = fingerprint(model)
    for key, value in before["tensors"].items():
        assert torch.equal(after["tensors"][key], value), key


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_gradient_that_is_not_finite_is_refused_by_name_and_changes_nothing(family, value):
    model = small(family)
    optimizer = LipschitzMuon(model)
    train(model, optimizer, 2)
    for name, p in model.named_parameters():
        loss_of(model, text()).backward()
        p.grad.view(-1)[-1] = value
        weights, state = fingerprint(model), {k: v.clone() for k, v in optimizer.state[p].items()}
        with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
            optimizer.step()
        assert_unchanged(model, weights)
        assert all(torch.equal(v, state[k]) for k, v in optimizer.state[p].items())
        optimizer.zero_grad()
    train(model, optimizer, 1)
    assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE


def write_in_place(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(10.0)


def write_through_data(p: nn.Parameter) -> None:
    p.data.mul_(10.0)


def write_new_data(p: nn.Parameter) -> None:
    p.data = p.data * 10.0


def write_through_an_alias(p: nn.Parameter) -> None:
    p.detach().numpy()[...] *= 10.0


@pytest.mark.parametrize(
    "write", [write_in_place, write_through_data, write_new_data, write_through_an_alias]
)
@pytest.mark.parametrize("method", ["soft_cap", "weight_decay", "spectral_normalize"])
def test_a_weight_written_to_from_outside_is_back_within_its_cap_after_the_next_step(write, method):
    model = small("gpt2", paper(method=method))
    optimizer = LipschitzMuon(model, lr=0.1)
    train(model, optimizer, 3)
    for _, module in constrained_modules(model):
        write(module.weight)
    assert worst_over_cap(model) > 5.0
    train(model, optimizer, 1)
    assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE


def test_a_weight_above_its_cap_before_the_first_step_is_within_it_afterwards():
    model = randomize_(small("llama"))
    assert worst_over_cap(model) > 1.2
    optimizer = LipschitzMuon(model)
    train(model, optimizer, 1)
    assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    model = small("llama")
    optimizer = LipschitzMuon(model)
    before = model.lm_head.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, text())
        loss.backward()
        return loss

    expected = float(loss_of(model, text()).detach())
    assert float(optimizer.step(closure).detach()) == expected
    assert not torch.equal(model.lm_head.weight, before)


def test_groups_give_the_same_training_as_the_model():
    one, two = small("gpt2"), small("gpt2")
    two.load_state_dict(one.state_dict())
    by_model = LipschitzMuon(one, lr=0.1, embedding_lr=0.2, adamw_lr=0.01)
    by_groups = LipschitzMuon(param_groups(two, 0.1, 0.2, 0.01), lr=0.1)
    assert train(one, by_model, 5) == train(two, by_groups, 5)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_params_that_are_neither_a_model_nor_our_groups_are_refused():
    model = small("gpt2")
    wrong = (
        model.parameters(),
        list(model.parameters()),
        [{"params": list(model.parameters())}],
        [{"params": list(model.parameters()), "kind": "muon"}],
        dict(model.named_parameters()),
        [{"params": [model.lm_head.weight], "kind": "matrix"}],  # no layouts: no cap could be kept
        [{"params": [model.lm_head.weight], "kind": "matrix", "layouts": []}],
    )
    for params in wrong:
        with pytest.raises(ConfigError, match="param_groups|layouts"):
            LipschitzMuon(params)


def test_a_model_without_a_retrofit_is_refused():
    with pytest.raises(NotRetrofittedError, match="retrofit"):
        LipschitzMuon(tiny("gpt2"))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "embedding_lr", "adamw_lr"])
def test_a_rate_that_is_not_positive_and_finite_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        LipschitzMuon(small("gpt2"), **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"momentum": math.nan},
        {"weight_decay": -1.0},
        {"weight_decay": math.nan},
    ],
    ids=repr,
)
def test_other_bad_options_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        LipschitzMuon(small("gpt2"), **options)


def test_sparse_gradients_are_refused_by_name():
    model = small("gpt2")
    model.transformer.wte.sparse = True
    optimizer = LipschitzMuon(model)
    loss_of(model, text()).backward()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=r"wte.*sparse"):
        optimizer.step()
    assert_unchanged(model, before)


def test_it_is_a_torch_optimizer_to_everything_that_asks():
    model = small("llama")
    optimizer = LipschitzMuon(model, lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, 1)
    assert calls == ["pre", "post"]
    assert "LipschitzMuon" in repr(optimizer)
    assert optimizer.seconds_projecting > 0


def test_equal_blocks_are_stepped_as_one_batch_with_the_same_result_as_alone():
    """Two layers batched together equal two layers stepped one after the other."""
    model, twin = tiny("llama"), tiny("llama")
    retrofit(model, paper())
    retrofit(twin, paper())
    twin.load_state_dict(model.state_dict())
    together, alone = LipschitzMuon(model, lr=0.2), []
    for group in param_groups(twin, 0.2, 0.2, 3e-3):
        alone += [
            LipschitzMuon([{**group, "params": [p], "layouts": [layout]}], lr=0.2)
            for p, layout in zip(group["params"], group["layouts"], strict=True)
        ]
    for step in range(61, 67):
        adversarial_gradients_(model, step)
        adversarial_gradients_(twin, step)
        together.step()
        for optimizer in alone:
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-5), name  # float32 sums in another order


def test_the_result_does_not_depend_on_the_scale_of_the_gradients():
    one, two = small("llama"), small("llama")
    two.load_state_dict(one.state_dict())
    a, b = LipschitzMuon(one), LipschitzMuon(two)
    for _ in range(3):
        loss_of(one, text()).backward()
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            q.grad = p.grad * 2.0**40  # a power of two: exact
        a.step()
        b.step()
        a.zero_grad()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-5)


def test_fused_attention_heads_are_stepped_one_by_one():
    """A gradient in one attention head moves that head alone.

    Muon on the whole matrix would move all of them.
    """
    model = small("gpt2", paper(w_max=1e3))  # a soft cap nearby would shrink the others
    optimizer = LipschitzMuon(model, lr=0.1)
    module = model.transformer.h[0].attn.c_attn
    module.weight.grad = torch.zeros_like(module.weight)
    view = {s.role: v for s, v in module.layout.views(module.weight.grad)}["k"]
    view[1] = torch.randn(view[1].shape)
    before = module.weight.detach().clone()
    optimizer.step()
    for segment, moved in module.layout.views(module.weight.detach() - before):
        for head in range(segment.count):
            touched = segment.role == "k" and head == 1
            assert bool(moved[head].any()) == touched


def test_a_sharded_parameter_is_stepped_whole_and_refused_where_only_shards_are_seen(tmp_path):
    """A sharded parameter is stepped whole, and refused where only shards are seen.

    A DTensor's shard has another norm than its matrix. Several processes are in
    test_distributed.py.
    """
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = small("llama")
        module = model.model.layers[0].mlp.up_proj
        with torch.no_grad():
            module.weight.mul_(3.0)
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))
        assert isinstance(module.weight, DTensor)
        worst = {b.name: b.worst_over_cap for b in project_(model)}
        assert worst["model.layers.0.mlp.up_proj"] <= 1 + CAP_TOLERANCE
        optimizer = LipschitzMuon(model, lr=0.1)
        before = module.weight.to_local().clone()
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()
        assert not torch.equal(before, module.weight.to_local())
        assert isinstance(optimizer.state[module.weight]["momentum"], DTensor)
        with pytest.raises(UnsupportedModelError, match=r"(?i)sharded"):
            next(batches([module.weight], [module.layout]))
    finally:
        distributed.destroy_process_group()
