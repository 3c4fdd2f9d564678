"""What does gate_max, an entrywise cap in gated MLPs, cost in loss and give in bounds?

    python benchmarks/gate_max.py                # a small llama on the Python language reference
    python benchmarks/gate_max.py --text FILE
    python benchmarks/gate_max.py --smoke

gate_max caps both factors of a gated MLP, entry by entry. The model, the data and the seed are the
same for every cap. Bounds are from the caps alone and from the trained weights.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import (
    Characters,
    Table,
    characters,
    finish,
    fit,
    headline,
    machine,
    own_loss,
    parsed,
    parser,
    recipe,
    windows,
)
from transformers import LlamaConfig, LlamaForCausalLM

from lip_plugin import LipschitzMuon, certify, falsify, retrofit

CAPS = (None, 8.0, 4.0, 2.0)


def parse() -> argparse.Namespace:
    values = {"steps": 300, "length": 64, "width": 96, "layers": 2, "restarts": 4, "w_max": 1.4}
    return parsed(parser(__doc__, text=True, **values), steps=4, length=16, width=32, restarts=1)


def train(text: Characters, cap: float | None, options: argparse.Namespace) -> Any:
    """A llama that was trained under caps, with this gate_max."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(text.vocabulary),
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        max_position_embeddings=options.length,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.loss_type = "ForCausalLM"
    retrofit(
        model,
        recipe(
            w_max=options.w_max,
            overrides={"lm_head": 8.0},
            logit_scale=1.0,
            attention_scale=2.0,
            gate_max=cap,
            residual=0.5,
        ),
    )
    return fit(
        model,
        LipschitzMuon(model, lr=0.1),
        options.steps,
        lambda: windows(text.train, options.length, 24),
        title=f"gate_max {cap}",
    )


def main() -> None:
    options = parse()
    where = machine()
    headline("gate_max", where)
    text = characters(options.text)
    batch = text.held_out[: 64 * options.length].view(-1, options.length)
    table = Table(
        *(("gate_max", ""), ("loss", "6.3f"), ("log10 bound, weights", ".2f")),
        *(("from caps", ".2f"), ("an attack attains", ".3g")),
    )
    rows = []
    for cap in CAPS:
        model = train(text, cap, options)
        with torch.no_grad():
            loss = float(own_loss(model, batch))
        row = {
            "gate_max": cap,
            "loss": loss,
            "log10_weights": certify(model).log10_lipschitz,
            "log10_caps": certify(model, "caps").log10_lipschitz,
            "attained": falsify(model, restarts=options.restarts, steps=40).lower_bound,
        }
        rows.append(row)
        table.row(*row.values())
    finish("gate_max", where, rows=rows, **vars(options))


if __name__ == "__main__":
    main()
