"""Certified norms of GPT-2-small's matrices against float64 singular values: time and tightness.

One number per block: 12 layers, c_attn as its 36 heads (64 x 768), attention c_proj 768 x 768, c_fc
3072 x 768, MLP c_proj 768 x 3072; equal shapes in one batch. All alternate, and the medians of the same
run are compared. LAPACK is slow for wide matrices, so svdvals is timed as stored and, as
`sigma_max_exact` does it, transposed to tall; ratios to both are given. The weights are synthetic
(no download): Gaussian, and with the dense flat top that training under a cap leaves.

    python benchmarks/linalg_speed.py            # a minute or two on two cores
    python benchmarks/linalg_speed.py --smoke    # one small layer, seconds
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lip_plugin.linalg.norms import sigma_max_exact, sigma_max_upper
from lip_plugin.linalg.projections import project


def shapes(layers: int, d: int, heads: int) -> dict[str, tuple[int, int, int]]:
    """(blocks, d_out, d_in) of each kind of matrix in all layers together."""
    return {
        "attn.c_attn by head": (layers * 3 * heads, d // heads, d),
        "attn.c_proj": (layers, d, d),
        "mlp.c_fc": (layers, 4 * d, d),
        "mlp.c_proj": (layers, d, 4 * d),
    }


def weights(shape: tuple[int, int, int], kind: str) -> Tensor:
    """GPT-2's initialization, or the same after a soft cap at half its norm: a dense flat top."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator) * 0.02
    if kind == "capped":
        cap = 0.5 * 0.02 * (shape[1] ** 0.5 + shape[2] ** 0.5) * (shape[2] / shape[1]) ** 0.5
        w = project(w, cap)
    return w


def seconds(call: Callable[[], Tensor], device: str) -> float:
    """Wall time of one call, device synchronized."""
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def measure(w: Tensor, repeats: int, device: str) -> dict[str, float]:
    """Medians of both, alternating, and how far the bound is above the truth at worst."""
    truth, upper = sigma_max_exact(w), sigma_max_upper(w)  # also warms up
    if not bool((upper >= truth * (1 - 1e-13)).all()):
        raise SystemExit("an upper bound lies below the singular value: please report this")
    svdvals_s, exact_s, upper_s = [], [], []
    for _ in range(repeats):
        svdvals_s.append(seconds(lambda: torch.linalg.svdvals(w.double()), device))
        exact_s.append(seconds(lambda: sigma_max_exact(w), device))
        upper_s.append(seconds(lambda: sigma_max_upper(w), device))
    return {
        "svdvals_s": statistics.median(svdvals_s),
        "exact_s": statistics.median(exact_s),
        "upper_s": statistics.median(upper_s),
        "excess": float((upper / truth - 1).max()),
    }


def show(kind: str, matrix: str, blocks: str, row: dict[str, float]) -> None:
    """One line of the table; `row` as from `measure`."""
    times = "".join(f"{row[k]:10.3f}s" for k in ("svdvals_s", "exact_s", "upper_s"))
    ratios = "".join(f"{row[k] / row['upper_s']:10.1f}x" for k in ("svdvals_s", "exact_s"))
    print(f"{kind:10}{matrix:22}{blocks:>14}{times}{ratios}{row['excess']:11.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="one layer, 128 wide, one repeat")
    args = parser.parse_args()
    layers, d, heads, repeats = args.layers, 768, 12, max(1, args.repeats)
    if args.smoke:
        layers, d, heads, repeats = 1, 128, 4, 1
    name = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    date = datetime.date.today().isoformat()
    print(f"certified norms against float64 svdvals | {name} | torch {torch.__version__} | {date}")
    head = ("svdvals", "tall", "certified", "ratio", "to tall", "excess")
    print(f"{'weights':10}{'matrix':22}{'blocks':>14}" + "".join(f"{h:>11}" for h in head))
    summary = {}
    for kind in ("gaussian", "capped"):
        rows: dict[str, dict[str, float]] = {}
        for matrix, shape in shapes(layers, d, heads).items():
            rows[matrix] = measure(weights(shape, kind).to(args.device), repeats, args.device)
            show(kind, matrix, "x".join(map(str, shape)), rows[matrix])
        total = {k: sum(r[k] for r in rows.values()) for k in ("svdvals_s", "exact_s", "upper_s")}
        total["excess"] = max(r["excess"] for r in rows.values())
        show(kind, "all", "", total)
        ratios = {k: total[f"{k}_s"] / total["upper_s"] for k in ("svdvals", "exact")}
        summary[kind] = {**total, "ratio": ratios["svdvals"], "ratio_to_tall": ratios["exact"]}
    result = {"benchmark": "linalg_speed", "device": name, "torch": torch.__version__, "date": date}
    print(json.dumps({**result, "layers": layers, "d": d, "repeats": repeats, **summary}))


if __name__ == "__main__":
    main()
