"""How strong is the attack? Attained over proven, for every family and the hand-made worst cases.

    python benchmarks/attack_strength.py
    python benchmarks/attack_strength.py --smoke

The column `first` holds what the attack attained before it had structured starts, small balls and
several lengths (8 restarts, 100 steps, 17 tokens, the same weights, 2026-11-23). It is from the
first run of this script, and "-" where that did not run. The rows `dense search` are maps that are
small enough to be searched densely: there the attack is compared with that search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from common import Table, finish, headline, machine, parsed, parser, recipe

from lip_plugin import certify, falsify, project_, retrofit
from lip_plugin.certificate.attack.exhaustive import dense_search
from lip_plugin.certificate.graph.build import build
from tests.support.families import FAMILIES, tiny
from tests.support.oracles import randomize_
from tests.support.worst_cases import layered_gpt2, one_head_gpt2

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
    """A model with random weights, projected onto caps of 1.5; untouched if `norms` is None."""
    model: Any = randomize_(tiny(name))
    if norms is not None:
        retrofit(model, recipe(w_max=1.5, norms=norms))
        randomize_(model)
        project_(model)
    return model


def cases(smoke: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each case's name, and what makes its model."""
    for heads in (4,) if smoke else (1, 4, 12):
        yield f"one head of {heads}", lambda heads=heads: one_head_gpt2(heads)
        yield f"one head of {heads}, 3 layers", lambda heads=heads: layered_gpt2(heads, 3)
    for name in FAMILIES[:1] if smoke else FAMILIES:
        for norms in ("remove",) if smoke else ("remove", "keep", None):
            label = {"remove": "norms removed", "keep": "norms kept", None: "untouched"}[norms]
            yield f"{name}, {label}", lambda name=name, norms=norms: family(name, norms)


def small(name: str) -> Any:
    """A model of one block and width 2, small enough for a dense search."""
    model: Any = randomize_(
        tiny(name, hidden_size=2, num_attention_heads=1, num_hidden_layers=1, vocab_size=5)
    )
    retrofit(model, recipe(attention_scale=4.0))
    return randomize_(model)


def main() -> None:
    options = parsed(parser(__doc__, restarts=8, steps=(100, "of each start")), restarts=1, steps=5)
    where = machine()
    headline("attack strength", where)
    rows: list[dict[str, Any]] = []
    table = Table(
        *(("case", "<28"), ("proven", "11.5g"), ("attained", "11.5g"), ("ratio", "8.5g")),
        *(("first", "9.4g"), ("gain", "7.3g"), ("s", "6.1f"), ("start", "<")),
    )
    for label, make in cases(options.smoke):
        model, began = make(), time.perf_counter()
        found, upper = falsify(model, options.restarts, options.steps), certify(model).lipschitz
        seconds, first = time.perf_counter() - began, FIRST.get(label)
        attained = found.lower_bound
        rows.append(
            {"case": label, "proven": upper, "attained": attained, "first_version": first}
            | {"start": found.start, "tokens": found.tokens, "seconds": seconds}
        )
        gain = attained / first if first else None
        start = f"{found.start}, {found.tokens} tokens"
        table.row(label, upper, attained, attained / upper, first, gain, seconds, start)
    for tokens in (1, 2):
        model, points = small("gpt2"), 200 if options.smoke else 4000
        found = falsify(model, options.restarts, options.steps, tokens=tokens)
        truth = dense_search(build(model).body, 2, found.radius, tokens, points=points)
        attained = found.lower_bound
        rows.append({"case": f"dense, {tokens} tokens", "proven": truth, "attained": attained})
        name = f"dense search, {tokens} tokens"
        table.row(name, truth, attained, attained / truth, None, None, None, "")
    finish("attack_strength", where, rows=rows, restarts=options.restarts, steps=options.steps)


if __name__ == "__main__":
    main()
