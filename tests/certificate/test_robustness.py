"""Certified radii hold under attack at every eps, curves never cross, and bad input is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lip_plugin
from lip_plugin import (
    activation_report,
    attacked_accuracy,
    certified_accuracy,
    certified_radius,
    retrofit,
)
from lip_plugin.certificate.diagnostics.activation_report import FORMATS
from lip_plugin.certificate.graph.attention import Attention
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.robustness.accuracy import Radii
from lip_plugin.certificate.robustness.attack import attack, into_ball, margins_of
from lip_plugin.certificate.robustness.balls import PixelBall, TokenBall
from lip_plugin.certificate.robustness.movement import Local, Movement
from lip_plugin.certificate.robustness.rules import move
from lip_plugin.errors import ConfigError
from lip_plugin.linalg.norms import rms_norm
from tests.support.families import CLASSIFIERS, FAMILIES, PADDED, PADDING, inputs_for, tiny
from tests.support.oracles import logits_of, paper, randomize_

WIDE = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)


def model_of(name: str, norms: str = "remove", seed: int = 3, **overrides: Any) -> nn.Module:
    model = tiny(name, **overrides)
    retrofit(model, paper(norms=norms, attention_scale=2.0))
    randomize_(model, seed)
    with torch.no_grad():  # moderate: certificates are neither empty nor trivial
        for p in model.parameters():
            p.mul_(0.6)
    return model


def own_labels(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """A batch whose labels are what the model itself predicts, so that its accuracy is 1."""
    graph = build(model)
    with torch.no_grad():
        predicted = graph.body.run(graph.embed(inputs, torch.float64)).argmax(-1)
    if graph.patches is not None:
        return {"pixel_values": inputs, "labels": predicted[:, 0]}
    if predicted.shape[1] == 1:
        return {"input_ids": inputs, "labels": predicted[:, 0]}
    if graph.parts.architecture.attention.causal:
        predicted = torch.cat([inputs[:, :1], predicted[:, :-1]], 1)
    return {"input_ids": inputs, "labels": predicted}


@pytest.mark.parametrize("norms", ["remove", "keep"])
@pytest.mark.parametrize("name", FAMILIES)
def test_certified_never_exceeds_attacked_token_by_token(name: str, norms: str) -> None:
    # at 3 the biases of these two, with norms in front of the head, decide alone
    model = model_of(name, norms, {"opt_projected": 5, "distilbert_classifier": 11}.get(name, 3))
    batch = own_labels(model, inputs_for(name, 6 if name in CLASSIFIERS else 2, 8))
    certified = certified_accuracy(model, [batch], WIDE)
    attacked = attacked_accuracy(model, [batch], WIDE, restarts=3, steps=12)
    assert certified.clean == attacked.clean == 1.0
    assert not bool((certified.right & ~attacked.right).any())
    assert attacked.accuracy[-1] < 0.5, "an attack that turns nothing proves nothing"
    if norms == "remove":
        assert certified.accuracy[0] > 0.5, "a certificate that proves nothing cannot fail"
    assert all(a >= b for a, b in zip(certified.accuracy, certified.accuracy[1:]))
    assert all(a >= b for a, b in zip(attacked.accuracy, attacked.accuracy[1:]))


SHAPES = {
    "name": st.sampled_from(["gpt2", "llama", "qwen3"]),
    "layers": st.integers(1, 3),
    "heads": st.sampled_from([1, 2, 4]),
    "scale": st.sampled_from([0.2, 0.6, 1.2]),
    "tokens": st.integers(1, 6),
    "twins": st.booleans(),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=10, deadline=None, derandomize=True)
@given(**SHAPES)
def test_random_models_keep_their_predictions_within_the_radius(**shape: Any) -> None:
    check_random_model(**shape)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(**SHAPES)
def test_many_random_models_keep_their_predictions_within_the_radius(**shape: Any) -> None:
    check_random_model(**shape)


def check_random_model(
    name: str, layers: int, heads: int, scale: float, tokens: int, twins: bool, seed: int
) -> None:
    """At the very radius, attacked token by token."""
    kv = {} if name == "gpt2" else {"num_key_value_heads": 1}
    model = model_of(
        name, "remove", seed, num_hidden_layers=layers, num_attention_heads=heads, **kv
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    ids = torch.randint(0, 67, (1, tokens), generator=torch.Generator().manual_seed(seed))
    ids = ids[:, :1].expand(1, tokens) if twins else ids
    found = certified_radius(model, ids, refine=3)
    graph = build(model)
    for t in range(tokens):
        radius = float(found.radius[0, t])
        if radius > 0:
            target = torch.zeros(1, tokens, dtype=torch.bool)
            target[0, t] = True
            x = graph.embed(ids, torch.float64).detach()
            ball = TokenBall(graph)
            assert not bool(attack(ball, x, found.prediction, target, [radius], 2, 10, seed).any())


def test_an_attack_on_the_models_own_forward_keeps_the_prediction() -> None:
    """Embeddings that move by the certified radius keep the prediction.

    The library's own forward in float64 says so, not our graph.
    """
    model = model_of("gpt2").double()
    ids = torch.randint(0, 67, (2, 6))
    found = certified_radius(model, ids)
    assert torch.equal(found.prediction, logits_of(model, ids).argmax(-1))
    assert float(found.radius.min()) > 0
    radius = float(found.radius.min())
    table: Any = model.get_submodule("transformer.wte")
    ball = TokenBall(build(model))
    for _ in range(20):
        change = into_ball(ball, torch.randn(2, 6, 32, dtype=torch.float64) * 1e3, radius)
        handle = table.register_forward_hook(lambda m, a, out, c=change: out + c)
        moved = logits_of(model, ids).argmax(-1)
        handle.remove()
        assert torch.equal(moved, found.prediction)


def test_gradients_only_ever_raise_radii_and_eps_grids_agree() -> None:
    model = model_of("llama")
    ids = torch.randint(0, 67, (2, 7))
    plain, fine = certified_radius(model, ids, refine=0), certified_radius(model, ids, refine=8)
    assert bool((fine.radius >= plain.radius).all())
    assert float(fine.radius.mean()) > 1.2 * float(plain.radius.mean())
    eps = 0.5 * float(fine.radius[:, :-1].median())
    share = certified_accuracy(model, [own_labels(model, ids)], [eps], refine=8).right[0]
    radius = fine.radius[:, :-1].flatten()
    assert bool(share[radius >= eps].all())
    assert bool(
        (radius[share] * 10 ** (6 / 63) * (1 + 1e-9) >= eps).all()
    )  # the next point of the grid


def test_radii_are_zero_where_the_label_is_another_one() -> None:
    model = model_of("gpt2")
    ids = torch.randint(0, 67, (1, 6))
    free = certified_radius(model, ids)
    labels = free.prediction.clone()
    labels[0, 2] = (labels[0, 2] + 1) % 67
    found: Radii = certified_radius(model, ids, labels)
    assert float(found.radius[0, 2]) == 0.0
    assert not bool(found.correct[0, 2])
    others = torch.arange(6) != 2
    assert torch.equal(found.radius[0, others], free.radius[0, others])


def test_a_tie_is_never_certified() -> None:
    """Where two rows of the head are equal, the largest logit is shared and never certified."""
    model: Any = model_of("gpt2")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[:1].expand(67, -1))
    assert float(certified_radius(model, torch.randint(0, 67, (1, 4))).radius.max()) == 0.0


def test_a_broken_rule_is_caught_by_the_same_contract() -> None:
    """If attention counts as immovable, the attack exceeds the claim at some eps."""

    def immovable(node: Any, x: Tensor, movement: Movement, local: Any) -> tuple[Tensor, Movement]:
        return node.run(x), movement.scaled(0.0)

    model = model_of("gpt2", num_attention_heads=1)
    with torch.no_grad():
        for layer in model.transformer.h:  # type: ignore[union-attr]
            layer.attn.c_attn.weight.mul_(6.0)
            layer.mlp.c_proj.weight.zero_()
    batch = own_labels(model, torch.randint(0, 67, (2, 8)))
    grid = [0.003 * 1.3**i for i in range(16)]
    attacked = attacked_accuracy(model, [batch], grid, restarts=3, steps=20)
    assert not bool((certified_accuracy(model, [batch], grid).right & ~attacked.right).any())
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(move._rules, Attention, immovable)
        broken = certified_accuracy(model, [batch], grid, refine=0)
    assert bool((broken.right & ~attacked.right).any())


def test_the_attack_stays_in_its_ball() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64) * 100
    tokens, pixels = TokenBall(build(model_of("gpt2"))), PixelBall(build(model_of("vit")))
    assert float(rms_norm(into_ball(tokens, x, 0.25)).max()) <= 0.25 * (1 + 1e-15)
    inside = into_ball(pixels, torch.randn(3, 2, 4, 4, dtype=torch.float64), 0.25)
    assert torch.allclose(
        inside.flatten(1).norm(dim=1), torch.full((3,), 0.25, dtype=torch.float64)
    )
    logits = torch.tensor([[[1.0, 3.0, 2.0]]])
    assert float(margins_of(logits, torch.tensor([[1]]))) == 1.0
    assert float(margins_of(logits, torch.tensor([[0]]))) == -2.0


@pytest.mark.parametrize("name", FAMILIES)
def test_no_activation_exceeds_its_proven_bound(name: str) -> None:
    """No activation exceeds its proven bound, which is for every sequence of tokens.

    It is seen on random sequences, and on the tokens with the largest rows.
    """
    for norms in ("remove", "keep"):
        model = model_of(name, norms)
        ids = inputs_for(name, 8, 9)
        if name == "vit":
            ids = ids.sign()
        else:
            rows = (
                build(model).embed(torch.arange(67)[:, None], torch.float64).norm(dim=-1).flatten()
            )
            rows[PADDING] *= name not in PADDED
            ids[0] = int(rows.argmax())
        report = activation_report(model, ids)
        assert all(0 < row.seen <= row.proven for row in report.rows), norms
        assert all(
            e.proven <= e.seen + 1e-9 for e in report.entropies
        )  # 1e-9: entropy of float64 weights
        assert len(report.entropies) == 2
        assert report.rows[-1].kind in ("linear", "softcap")
        assert str(report).count("\n") > len(report.rows)


def test_report_says_which_formats_suffice() -> None:
    model: Any = model_of("gpt2")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.25)  # the logits are too large for float8 otherwise
    assert activation_report(model, torch.zeros(1, 4, dtype=torch.long)).fits("float8_e4m3fn")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    report = activation_report(model, torch.zeros(1, 4, dtype=torch.long))
    assert not report.fits("float8_e4m3fn")
    assert report.fits("bfloat16")
    for name, top in FORMATS.items():
        assert torch.finfo(getattr(torch, name)).max == top


def test_bad_input_is_refused() -> None:
    model = model_of("gpt2")
    ids = torch.randint(0, 67, (1, 4))
    with pytest.raises(ConfigError, match="increasing"):
        certified_accuracy(model, [ids], [0.1, 0.01])
    with pytest.raises(ConfigError, match="positive"):
        attacked_accuracy(model, [ids], [0.0])
    with pytest.raises(ConfigError, match="batches"):
        certified_accuracy(model, [])
    with pytest.raises(ConfigError, match=r"\[batch, tokens\]"):
        certified_radius(model, ids[0])
    with pytest.raises(ConfigError, match="same shape"):
        certified_radius(model, ids, ids[:, :2])
    with pytest.raises(ConfigError, match="empty"):
        certified_radius(model, ids[:, :0])
    with pytest.raises(ConfigError, match="restarts"):
        attacked_accuracy(model, [ids], restarts=0)


def test_figure_of_both_curves(tmp_path: Any) -> None:
    from lip_plugin.integrations.plots import plot_certified_accuracy

    model = model_of("gpt2")
    batch = own_labels(model, torch.randint(0, 67, (1, 6)))
    curves = certified_accuracy(model, [batch]), attacked_accuracy(model, [batch], steps=3)
    plot_certified_accuracy({"": curves}, tmp_path / "f.png", {"bigram": 0.3})
    assert (tmp_path / "f.png").stat().st_size > 5000


def test_public_names_are_there() -> None:
    for name in (
        "certified_radius",
        "certified_accuracy",
        "attacked_accuracy",
        "activation_report",
    ):
        assert name in dir(lip_plugin)
        assert callable(getattr(lip_plugin, name))


@pytest.mark.parametrize("norms", ["remove", "keep"])
def test_certified_never_exceeds_attacked_in_pixel_norm(norms: str) -> None:
    model = model_of("vit", norms)
    batch = own_labels(model, inputs_for("vit", 6))
    grid = [0.01 * 2.0**i for i in range(12)]
    certified = certified_accuracy(model, [batch], grid, norm="pixel_l2")
    attacked = attacked_accuracy(model, [batch], grid, norm="pixel_l2", restarts=3, steps=20)
    assert not bool((certified.right & ~attacked.right).any())
    assert attacked.accuracy[-1] < 0.5, "an attack that turns nothing proves nothing"
    if norms == "remove":
        assert certified.accuracy[0] > 0.5, "a certificate that proves nothing cannot fail"
    radius = certified_radius(model, batch["pixel_values"], batch["labels"], norm="pixel_l2").radius
    ball = PixelBall(build(model))
    with torch.no_grad():
        for _ in range(20):
            change = into_ball(ball, torch.randn(6, 2, 12, 12, dtype=torch.float64) * 1e3, 1.0)
            moved = batch["pixel_values"].double() + change * radius[:, :, None, None]
            found = ball.graph.body.run(ball.enter(moved)).argmax(-1)
            assert torch.equal(found[:, 0], batch["labels"])


@pytest.mark.parametrize("norms", ["remove", "keep"])
@pytest.mark.parametrize("eps", [1e-3, 0.1, 3.0])
def test_no_token_nor_all_together_move_further_than_a_pixel_change_is_proven_to(
    norms: str, eps: float
) -> None:
    """No token, and not all together, move further at any block than is proven.

    The change of pixels is in one patch or spread over all, and goes along random directions.
    """
    graph = build(model_of("vit", norms))
    ball, local = PixelBall(graph), Local()
    point = ball.point(inputs_for("vit", 2))
    with torch.no_grad():
        centre = ball.enter(point)
        movement = ball.movement(point, centre, torch.tensor([eps], dtype=torch.float64), local)
        for trial in range(12):
            change = torch.randn_like(point)
            if trial % 2:
                change[..., 4:] = 0.0
            x, moved, y = (
                centre,
                movement,
                ball.enter(point + into_ball(ball, change * 1e6, eps * (1 - 1e-12))),
            )
            for node in graph.body.nodes:
                x, moved = move(node, x, moved, local)
                y = node.run(y)
                size = (y - x).norm(dim=-1)
                # 1e-10: float64 rounding of the two passes
                assert bool((size <= moved.total(local)[0] + 1e-10).all()), node.name
                assert bool((size.norm(dim=-1) <= moved.joint(local)[0] + 1e-10).all()), node.name


def test_norms_and_batches_that_do_not_fit_are_refused() -> None:
    ids = torch.randint(0, 67, (2, 4))
    with pytest.raises(ConfigError, match="image models"):
        certified_radius(model_of("gpt2"), ids, norm="pixel_l2")
    with pytest.raises(ConfigError, match="choose one of"):
        certified_radius(model_of("gpt2"), ids, norm="l2")
    with pytest.raises(ConfigError, match="labels"):
        certified_accuracy(model_of("bert"), [ids])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with pytest.raises(ConfigError, match="without padding"):
        certified_accuracy(
            model_of("gpt2"), [{"input_ids": ids, "labels": ids, "attention_mask": mask}]
        )
    with pytest.raises(ConfigError, match="pixels are"):
        certified_radius(model_of("vit"), torch.zeros(1, 2, 8, 8), norm="pixel_l2")
