"""A preset starts to learn at any depth, and a residual that passes on too little is refused."""

from __future__ import annotations

import pytest
import torch

from lip_plugin import LipschitzConfig, retrofit
from lip_plugin.config_values import PRESETS
from lip_plugin.errors import ConfigError
from tests.support.families import DECODERS, inputs_for, tiny
from tests.support.oracles import logits_of, loss_of, paper

EVERY = [f for f in DECODERS if f != "opt_projected"]


def signal(family: str, config: LipschitzConfig | str | None, layers: int) -> tuple[float, float]:
    """(RMS of the logits, least norm of a block's gradient) at the start."""
    torch.manual_seed(0)
    model = tiny(family, num_hidden_layers=layers)
    retrofit(model, config)
    x = inputs_for(family, 4, 12)
    size = float(logits_of(model, x).detach().square().mean().sqrt())
    loss_of(model, x).backward()
    out = ("c_proj", "o_proj", "dense", "out_proj", "down_proj", "fc2", "4h_to_h")
    found = [
        float(p.grad.norm())
        for name, p in model.named_parameters()
        if p.grad is not None and p.dim() == 2 and any(f"{leaf}.weight" in name for leaf in out)
    ]
    assert len(found) >= 2 * layers
    return size, min(found)


@pytest.mark.parametrize("residual", [(0.75, 0.9), (0.4, 0.95)])
def test_what_was_seen_not_to_learn_is_refused_with_the_numbers(residual) -> None:
    config = paper(residual=residual)
    retrofit(tiny("gpt2", num_hidden_layers=4), config)
    with pytest.raises(ConfigError, match=r"over 6 layers passes on .*Leave residual out"):
        retrofit(tiny("gpt2", num_hidden_layers=6), config)


@pytest.mark.parametrize("layers", [3, 12, 24, 48])
def test_the_papers_weights_pass_a_signal_on_at_any_depth(layers: int) -> None:
    """1/(2L) for L layers: (1 - 1/(2L))^(2L) is about 1/e."""
    retrofit(tiny("gpt2", num_hidden_layers=layers), LipschitzConfig.preset("paper"))


def test_what_leaves_float32_is_refused_with_a_cure_that_works() -> None:
    config = paper(residual=(0.75, 0.9))
    with pytest.raises(ConfigError, match="48 layers.*Leave residual out"):
        retrofit(tiny("gpt2", num_hidden_layers=48), config)
    retrofit(tiny("gpt2", num_hidden_layers=48), paper(residual="auto"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", EVERY)
def test_a_signal_reaches_the_logits_and_a_gradient_every_block(family: str, preset: str) -> None:
    """At the first step, beside the model with one layer.

    At 12 and 24 layers both are within a factor of 150. With 3 layers and steps of (0.75, 0.9),
    which are the best there, the identity path passes on 0.025 a layer: 6e-4 through two. A branch
    is multiplied by its residual weight, which falls as 1 / layers, and its gradient with it. So
    gradients are compared times the number of layers. Heads with content are as quiet as they are
    sharp: their output is multiplied by 1/32, or by 1/33 with turned keys, and so is its gradient.
    """
    size, least = signal(family, preset, 1)
    least /= 33.0 if preset == "content" else 1.0
    for layers, factor in ((3, 2000), (12, 150), (24, 150)):
        found, gradient = signal(family, preset, layers)
        assert size / factor <= found <= size * factor
        assert gradient * layers >= least / factor
