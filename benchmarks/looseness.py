"""Where is a certificate loose? Proven over attained, node by node, on a trained model.

    python benchmarks/looseness.py --model runs/char_lm/model   # a folder of save_pretrained
    python benchmarks/looseness.py                              # a small model, trained on the spot
    python benchmarks/looseness.py --smoke

Every node (each sub-block, and inside it attention, matrices and activations) is attacked alone, on
the ball that the certificate has for it. Slopes and sizes are attained by an input that exists, but
the network before the node may never produce it. So a ratio near 1 says that the node's rule is
tight on its ball. The last line, the whole model, also holds what composition loses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from common import Table, finish, headline, machine, parsed, parser, recipe
from tqdm import tqdm

from lip_plugin import LipschitzMuon, certify, falsify, retrofit
from lip_plugin.certificate.attack.falsify import falsify_node
from lip_plugin.certificate.attack.starts import d_in_of
from lip_plugin.certificate.certify import bound_of
from lip_plugin.certificate.graph.base import ProvenNorms
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.graph.containers import Residual
from lip_plugin.certificate.graph.decimals import add, to_float, up
from lip_plugin.certificate.input_radius import radius_of
from lip_plugin.certificate.weight_norms import weight_norms
from lip_plugin.linalg.norms import row_rms_max_upper
from lip_plugin.optim.groups import param_groups


def load(folder: str) -> Any:
    """A saved model; from_pretrained re-applies a retrofit, because lip_plugin is imported."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def train(steps: int) -> Any:
    """A small GPT-2 that learned to continue arithmetic sequences modulo 31."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "vocab_size": 31}
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    config = recipe(
        w_max=2.0, biases="drop", attention_scale=4.0, overrides={"lm_head": 8.0}, logit_scale=1.0
    )
    retrofit(model, config)
    optimizer = LipschitzMuon(param_groups(model, 0.05, 0.05, 1e-3), lr=0.05)
    for _ in range(steps):
        first, by = torch.randint(0, 31, (2, 32, 1))
        ids = (first + by * torch.arange(24)) % 31
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def entries(graph: Graph) -> Iterator[tuple[str, Any, Decimal, int, Any]]:
    """(label, node, radius in, width in, bound) of every node on the certificate's ball there."""
    norms = weight_norms(graph)
    radius, width = up(to_float(radius_of(graph, "weights"))), d_in_of(graph.body)
    for node in graph.body.nodes:
        bound = node.bound(radius, norms)
        yield node.name, node, radius, width, bound
        if isinstance(node, Residual):
            inner, inner_width = radius, width
            for part in node.branch.nodes:
                part_bound = part.bound(inner, norms)
                yield f"  {type(part).__name__} {part.name}", part, inner, inner_width, part_bound
                inner, inner_width = part_bound.radius, width_out(part, inner_width)
        radius, width = bound.radius, width_out(node, width)


def width_out(node: Any, width: int) -> int:
    """How wide what leaves a node is."""
    with torch.no_grad():
        x = torch.zeros(1, 1, width, dtype=torch.float64, device=device_of(node))
        return int(node.run(x).shape[-1])


def device_of(node: Any) -> torch.device:
    from lip_plugin.certificate.attack.falsify import _device

    return _device(node)


def ratio(proven: float, attained: float) -> float:
    return proven / attained if attained > 0 else math.inf


def measure(model: Any, restarts: int, steps: int) -> list[dict[str, Any]]:
    """Attack every node, and then the whole model; a row each."""
    graph, rows = build(model), []
    for label, node, radius, width, bound in tqdm(list(entries(graph)), desc="nodes"):
        found = falsify_node(node, to_float(radius), width, (17, 1), restarts=restarts, steps=steps)
        rows.append(
            row(label, to_float(radius), to_float(bound.lipschitz), found.lipschitz_lower)
            | {"radius_proven": to_float(bound.radius), "radius_attained": found.radius_lower}
            | {"radius_ratio": ratio(to_float(bound.radius), found.radius_lower)}
        )
    whole = falsify(model, restarts=2 * restarts, steps=2 * steps, progress=True)
    rows.append(row("whole model", whole.radius, certify(model).lipschitz, whole.lower_bound))
    return rows


def by_rules(model: Any) -> dict[str, float]:
    """log10 of the whole bound with fewer rules.

    First every map is bounded alone and tables by their largest rows, then one rule more each time.
    """
    with torch.no_grad():
        graph = build(model)
        norms = weight_norms(graph)
        single = ProvenNorms(norms)
        tables = graph.entry.tables.values()
        apart = add(*(up(float(row_rms_max_upper(table.read()))) for table in tables))
        return {
            "single maps, largest rows": bound_of(graph, single, "weights", apart).log10_lipschitz,
            "joint maps, largest rows": bound_of(graph, norms, "weights", apart).log10_lipschitz,
            "joint maps, sums of rows": bound_of(graph, norms, "weights").log10_lipschitz,
        }


def row(name: str, radius: float, proven: float, attained: float) -> dict[str, Any]:
    """One row of the results."""
    values = {
        "constant_proven": proven,
        "constant_attained": attained,
        "ratio": ratio(proven, attained),
    }
    return {"name": name, "radius_in": radius, **values}


def show(rows: list[dict[str, Any]]) -> None:
    """The table of all rows; the whole model has no radius behind it."""
    titles = ("radius in", "proven", "attained", "ratio", "radius out", "attained", "ratio")
    keys = ("radius_in", "constant_proven", "constant_attained", "ratio")
    keys += ("radius_proven", "radius_attained", "radius_ratio")
    width = max(len(r["name"]) for r in rows)
    table = Table(("node", f"<{width}"), *((title, "9.4g") for title in titles))
    for r in rows:
        table.row(r["name"], *(r.get(key) for key in keys))


def main() -> None:
    made = parser(__doc__, restarts=8, steps=(60, "of each start"))
    made.add_argument(
        "--model", help="a folder written by save_pretrained; default: trained on the spot"
    )
    made.add_argument("--out", help="write the JSON line to this file as well")
    options = parsed(made, restarts=1, steps=4)
    where = machine()
    headline("proven over attained, node by node", where)
    began = time.perf_counter()
    model = load(options.model) if options.model else train(20 if options.smoke else 300)
    rows = measure(model, options.restarts, options.steps)
    show(rows)
    rules = by_rules(model)
    for name, value in rules.items():
        print(f"{name:<26} bound {10**value:>10.5g}")
    line = finish(
        "looseness",
        where,
        model=Path(options.model).name if options.model else "trained on the spot",
        rows=rows,
        log10_by_rules=rules,
        restarts=options.restarts,
        steps=options.steps,
        seconds=time.perf_counter() - began,
    )
    if options.out:
        Path(options.out).write_text(line + "\n")


if __name__ == "__main__":
    main()
