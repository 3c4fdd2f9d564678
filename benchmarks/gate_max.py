"""What capping both factors of a gated MLP entrywise (gate_max) costs in loss and gives in bounds.

    python benchmarks/gate_max.py                # a small llama on the Python language reference
    python benchmarks/gate_max.py --text FILE
    python benchmarks/gate_max.py --smoke

The same model, data and seed for every cap; bounds from the caps alone and from the trained weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path
from pydoc_data import topics

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from lip_plugin import LipschitzConfig, LipschitzMuon, certify, falsify, retrofit

CAPS = (None, 8.0, 4.0, 2.0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", help="a text file; the Python language reference without")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    for name, default in (
        ("steps", 300),
        ("length", 64),
        ("width", 96),
        ("layers", 2),
        ("restarts", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--w-max", type=float, default=1.4)
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.length, options.width, options.restarts = 4, 16, 32, 1
    return options


def encoded(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, int]:
    text = Path(options.text).read_text() if options.text else "\n".join(topics.topics.values())
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[c] for c in text])
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(index)


def train(ids: torch.Tensor, vocabulary: int, cap: float | None, options: argparse.Namespace):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
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
        LipschitzConfig(
            w_max=options.w_max,
            overrides={"lm_head": 8.0},
            logit_scale=1.0,
            attention_scale=2.0,
            gate_max=cap,
            residual=0.5,
        ),
    )
    optimizer = LipschitzMuon(model, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0 - s / options.steps)
    for _ in tqdm(range(options.steps), desc=f"gate_max {cap}"):
        at = torch.randint(len(ids) - options.length, (24,))
        batch = torch.stack([ids[i : i + options.length] for i in at])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    options = parse()
    ids, held_out, vocabulary = encoded(options)
    batch = held_out[: 64 * options.length].view(-1, options.length)
    rows = []
    for cap in CAPS:
        model = train(ids, vocabulary, cap, options)
        with torch.no_grad():
            loss = float(model(batch, labels=batch).loss)
        rows.append(
            {
                "gate_max": cap,
                "loss": loss,
                "log10_weights": certify(model).log10_lipschitz,
                "log10_caps": certify(model, "caps").log10_lipschitz,
                "attained": falsify(model, restarts=options.restarts, steps=40).lower_bound,
            }
        )
    print(
        f"{'gate_max':>8}  {'loss':>6}  {'log10 bound, weights':>20}  {'from caps':>9}  {'an attack attains':>17}"
    )
    for row in rows:
        print(
            f"{row['gate_max']!s:>8}  {row['loss']:>6.3f}  {row['log10_weights']:>20.2f}  "
            f"{row['log10_caps']:>9.2f}  {row['attained']:>17.3g}"
        )
    where = {
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(
        json.dumps(
            {
                "benchmark": "gate_max",
                "rows": rows,
                "date": str(datetime.date.today()),
                **where,
                **vars(options),
            }
        )
    )


if __name__ == "__main__":
    main()
