"""How strong is the attack? Attained over proven for every family and for the hand-made worst cases.

    python benchmarks/attack_strength.py
    python benchmarks/attack_strength.py --smoke

`first version`: what the attack attained before it had structured starts, small balls and several lengths
(8 restarts, 100 steps, 17 tokens; the same weights, 2026-11-23), from this script's own first run; None
where it was not run. `dense` rows: for maps small enough to be searched densely, the attack over that search.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from lip_plugin import LipschitzConfig, certify, falsify, project_, retrofit
from lip_plugin.certificate.attack.exhaustive import dense_search
from lip_plugin.certificate.graph.build import build
from tests.support.families import FAMILIES, tiny
from tests.support.oracles import randomize_
from tests.support.worst_cases import layered_gpt2, one_head_gpt2

# From the first run, before the rewrite, on these weights.
FIRST: dict[str, float] = {
    "one head of 1": 0.444672,
    "one head of 1, 3 layers": 0.45916,
    "one head of 4": 0.90598,
    "one head of 4, 3 layers": 0.711204,
    "one head of 12": 2.22746,
    "one head of 12, 3 layers": 1.76408,
    "gpt2, norms removed": 0.63393,
    "gpt2, norms kept": 164.459,
    "gpt2, untouched": 123.934,
    "llama, norms removed": 0.596506,
    "llama, norms kept": 7501.69,
    "llama, untouched": 11449,
    "mistral, norms removed": 0.596506,
    "mistral, norms kept": 7501.69,
    "mistral, untouched": 11449,
    "qwen3, norms removed": 0.574067,
    "qwen3, norms kept": 7858.23,
    "qwen3, untouched": 10345.5,
    "nanogpt, norms removed": 0.656538,
    "nanogpt, norms kept": 113.042,
    "nanogpt, untouched": 195.455,
}


def family(name: str, norms: str | None) -> Any:
    """Random weights projected onto caps of 1.5, or (None) an untouched model with random weights."""
    model: Any = randomize_(tiny(name))
    if norms is not None:
        retrofit(model, LipschitzConfig(w_max=1.5, norms=norms))
        randomize_(model)
        project_(model)
    return model


def cases(smoke: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    for heads in (4,) if smoke else (1, 4, 12):
        yield f"one head of {heads}", lambda heads=heads: one_head_gpt2(heads)
        yield f"one head of {heads}, 3 layers", lambda heads=heads: layered_gpt2(heads, 3)
    for name in FAMILIES[:1] if smoke else FAMILIES:
        for norms in ("remove",) if smoke else ("remove", "keep", None):
            label = {"remove": "norms removed", "keep": "norms kept", None: "untouched"}[norms]
            yield f"{name}, {label}", lambda name=name, norms=norms: family(name, norms)


def small(name: str) -> Any:
    model: Any = randomize_(
        tiny(name, hidden_size=2, num_attention_heads=1, num_hidden_layers=1, vocab_size=5)
    )
    retrofit(model, LipschitzConfig(attention_scale=4.0))
    return randomize_(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--restarts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.restarts, options.steps = 1, 5
    rows: list[dict[str, Any]] = []
    print(
        f"{'case':<30}{'proven':>11}{'attained':>11}{'ratio':>10}{'first':>11}{'gain':>9}{'s':>7}  start"
    )
    for label, make in cases(options.smoke):
        model, began = make(), time.perf_counter()
        found, upper = falsify(model, options.restarts, options.steps), certify(model).lipschitz
        seconds, first = time.perf_counter() - began, FIRST.get(label)
        gain = found.lower_bound / first if first else None
        rows.append(
            {"case": label, "proven": upper, "attained": found.lower_bound, "first_version": first}
            | {"start": found.start, "tokens": found.tokens, "seconds": seconds}
        )
        print(
            f"{label:<30}{upper:>11.4g}{found.lower_bound:>11.4g}{found.lower_bound / upper:>10.3g}"
            f"{first or float('nan'):>11.4g}{gain or float('nan'):>9.3g}{seconds:>7.1f}  "
            f"{found.start}, {found.tokens} tokens"
        )
    for tokens in (1, 2):
        model = small("gpt2")
        found = falsify(model, options.restarts, options.steps, tokens=tokens)
        truth = dense_search(
            build(model).body, 2, found.radius, tokens, points=200 if options.smoke else 4000
        )
        rows.append(
            {"case": f"dense, {tokens} tokens", "proven": truth, "attained": found.lower_bound}
        )
        print(
            f"{f'dense search, {tokens} tokens':<30}{truth:>11.5g}{found.lower_bound:>11.5g}{found.lower_bound / truth:>10.5g}"
        )
    print(
        json.dumps(
            {
                "benchmark": "attack_strength",
                "rows": rows,
                "restarts": options.restarts,
                "steps": options.steps,
                "device": platform.processor() or "cpu",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
            }
        )
    )


if __name__ == "__main__":
    main()
