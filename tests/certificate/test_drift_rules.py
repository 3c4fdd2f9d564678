"""The rules of the drift hold one by one, for each kind of node.

Each node is attacked alone, worst cases are made by hand, and what must not be compared is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lip_plugin import drift, project_
from lip_plugin.certificate.attack.ascent import grow, in_ball
from lip_plugin.certificate.attack.starts import d_in_of
from lip_plugin.certificate.drift import attention_rule as drift_rules
from lip_plugin.certificate.drift.attention_rule import pull
from lip_plugin.certificate.drift.drift import _Pair, _sides
from lip_plugin.certificate.drift.rules import Streams, step
from lip_plugin.certificate.graph.containers import Chain, Residual
from lip_plugin.certificate.graph.decimals import up
from lip_plugin.certificate.graph.nodes import Activation, Scale
from lip_plugin.errors import ConfigError
from tests.certificate.test_drift import moved
from tests.support.families import tiny
from tests.support.oracles import paper, random_model, rms

CASES = [
    ("gpt2", "remove"),
    ("llama", "remove"),
    ("gpt_neox", "remove"),
    ("qwen3", "keep"),
    ("olmo2", "keep"),
]
CASES += [("gemma2", "keep"), ("bert", "keep")]


def inner(b: Any, t: Any) -> Iterator[tuple[Any, Any]]:
    """A pair of nodes and all pairs inside it."""
    yield b, t
    inside: Any = ()
    if isinstance(b, Residual):
        inside = [(b.branch, t.branch)]
    elif isinstance(b, Chain):
        inside = zip(b.nodes, t.nodes, strict=True)
    elif hasattr(b, "branches"):
        inside = zip(b.branches, t.branches, strict=True)
    for pair in inside:
        yield from inner(*pair)


def farthest(b: Any, t: Any, d: int, r: float, delta: float, tokens: int = 3) -> float:
    """The largest token norm of t(y) - b(x) that ascent finds.

    Tokens of x and y have a norm of at most r, and tokens of x - y of at most delta.
    """
    z = torch.randn(
        6, 2 * tokens, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def run(z: Tensor) -> Tensor:
        x, w = z.chunk(2, dim=1)
        x = x * (r * (1 - 1e-12))
        return t.run(in_ball(x + w * delta, r * (1 - 1e-12))) - b.run(x)

    return max(float(grow(run, z * scale, 1.0, 10, 0.3)[0].max()) for scale in (2.0, 0.1))


@pytest.mark.parametrize(("family", "norms"), CASES)
def test_no_node_is_farther_apart_than_its_rule_says(family: str, norms: str) -> None:
    base = random_model(family, paper(norms=norms), num_hidden_layers=1).double()
    if norms == "remove":
        project_(base)
    tuned = moved(base, 0.3)
    with torch.no_grad():
        pair = _Pair.of(base, tuned)
        sides = _sides(pair)
    for top in zip(pair.base.body.nodes, pair.tuned.body.nodes, strict=True):
        for b, t in inner(*top):
            if isinstance(b, (Scale, Activation)):
                continue
            try:
                d = d_in_of(t)
            except ValueError:
                d = 32
            for r, delta in ((1.0, 0.0), (0.3, 0.05)):
                upper = float(step(b, t, Streams(up(r), up(r), up(delta)), sides).delta)
                lower = farthest(b, t, d, r, delta)
                assert lower <= upper * (1 + 1e-9), (b.name, type(b).__name__)


def opposite(factor: float) -> tuple[Any, Any]:
    """Two attentions of one head that disagree on a token and its negative.

    The logits of two opposite values go from -+factor / 2 to +-factor / 2.
    """
    model = random_model("gpt2", paper(), num_hidden_layers=1, num_attention_heads=1).double()
    attention = model.transformer.h[0].attn
    with torch.no_grad():
        for p in attention.parameters():
            p.zero_()
        attention.c_attn.weight[1, 32] = attention.c_attn.weight[1, 64] = (
            1.0  # keys and values read e1
        )
        attention.c_attn.weight[0, 0] = -factor / 2  # the query reads e0
    tuned = moved(model, 0.0)
    with torch.no_grad():
        tuned.transformer.h[0].attn.c_attn.weight[0, 0] = factor / 2
    return model, tuned


@pytest.mark.parametrize("factor", [0.01, 0.3, 3.0])
def test_opposite_values_attain_the_rule_of_attention(factor: float) -> None:
    model, tuned = opposite(factor)
    with torch.no_grad():
        pair = _Pair.of(model, tuned)
        sides = _sides(pair)
        b, t = (g.body.nodes[0].branch.nodes[1].nodes[0] for g in (pair.base, pair.tuned))
        upper = float(step(b, t, Streams(up(1), up(1), up(0)), sides).delta)
        x = torch.zeros(1, 401, 32, dtype=torch.float64)
        x[0, :-1, 1] = 32**0.5 * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(200)
        x[0, -1, 0] = 32**0.5
        attained = float(rms(t.run(x) - b.run(x))[0, -1])
    assert attained <= upper <= 1.01 * attained


def test_what_softmax_can_do_is_rounded_up_and_never_above_two() -> None:
    for s in (0.0, 1e-30, 1e-9, 0.3, 2.0, 20.0, 1e3, 1e7):
        exact = 2 * math.tanh(s / 2)
        assert exact * (1 - 1e-15) <= float(pull(up(s))) <= min(exact * (1 + 1e-12), 2.0)
        assert pull(up(s)) <= up(s)


def test_other_rotations_are_no_equal_models() -> None:
    """Models with other rotations are not equal, though their weights are.

    The base frequency is no weight, and the logits differ.
    """
    base = random_model("llama", None).double()
    tuned = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 50.0}).double()
    tuned.load_state_dict(base.state_dict())
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert float((tuned(ids).logits - base(ids).logits).abs().amax()) > 0.1
    with pytest.raises(ConfigError, match="rotation"):
        drift(base, tuned)
    tuned.config.rope_parameters = base.config.rope_parameters
    with pytest.raises(ConfigError, match="turns queries and keys otherwise"):
        drift(base, tuned)


@pytest.mark.parametrize(
    ("family", "tables"), [("gpt2", ()), ("gpt2", ("wte", "wpe")), ("bert", ("embeddings",))]
)
def test_the_witness_attains_what_is_claimed(family: str, tables: tuple[str, ...]) -> None:
    base = random_model(family, paper()).double()
    tuned = moved(moved(base, 0.1), 0.05, tables) if tables else moved(base, 0.1)
    found = drift(base, tuned, restarts=2, steps=8)
    assert found.witness is not None
    x, y = found.witness
    assert (found.embeddings > 0) is bool(tables)
    assert max(float(rms(x).amax()), float(rms(y).amax())) <= found.radius
    assert float(rms(x - y).amax()) <= found.embeddings * (1 + 1e-9)
    with torch.no_grad():
        difference = _Pair.of(base, tuned).difference(x[None], y[None])
    assert found.logit_lower <= float(difference.abs().amax()) <= found.logit_upper
    assert drift(base, tuned, attack=False).logit_lower == 0
    assert drift(base, tuned, attack=False).logit_upper == found.logit_upper


def test_a_rule_that_takes_half_of_a_keys_change_is_exceeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rule that takes half of a key's change is exceeded by the worst case of attention."""
    real = drift_rules.pull
    monkeypatch.setattr(drift_rules, "pull", lambda s: real(s / 2))
    monkeypatch.setattr(drift_rules, "norm2", lambda values, f=drift_rules.norm2: f(values) / 2)
    with pytest.raises(AssertionError):
        test_opposite_values_attain_the_rule_of_attention(0.1)
