"""How fast are certified norms against float64 singular values, and how far above them?

    python benchmarks/linalg_speed.py            # a minute or two on two cores
    python benchmarks/linalg_speed.py --smoke    # one small layer, seconds

The matrices have the shapes of GPT-2 small, with one norm for each block: 12 layers, c_attn as its
36 heads (64 x 768), attention c_proj 768 x 768, c_fc 3072 x 768, MLP c_proj 768 x 3072. Equal
shapes are one batch. All methods take turns, and the medians of the same run are compared. LAPACK
is slow for wide matrices, so svdvals is timed as stored and, as `sigma_max_exact` does it,
transposed to tall; ratios to both are given. The weights are synthetic, so that nothing is
downloaded: Gaussian, and with the dense flat top that training under a cap leaves.
"""

from __future__ import annotations

import torch
from common import Table, finish, headline, in_turns, machine, parsed, parser, wall
from torch import Tensor

from lip_plugin.linalg.norms import sigma_max_exact, sigma_max_upper
from lip_plugin.linalg.projections import project

TIMES = ("svdvals_s", "exact_s", "upper_s")


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


def measure(w: Tensor, repeats: int, device: str) -> dict[str, float]:
    """Median times of all methods, and how far the bound is above the truth at worst."""
    truth, upper = sigma_max_exact(w), sigma_max_upper(w)  # also warms up
    if not bool((upper >= truth * (1 - 1e-13)).all()):
        raise SystemExit("an upper bound lies below the singular value: please report this")
    calls = {
        "svdvals_s": lambda: torch.linalg.svdvals(w.double()),
        "exact_s": lambda: sigma_max_exact(w),
        "upper_s": lambda: sigma_max_upper(w),
    }
    seconds = wall(in_turns(calls, repeats, device, warm=0))
    return {**seconds, "excess": float((upper / truth - 1).max())}


def show(table: Table, kind: str, matrix: str, blocks: str, row: dict[str, float]) -> None:
    """One line of the table; `row` as from `measure`."""
    ratios = (row[key] / row["upper_s"] for key in TIMES[:2])
    table.row(kind, matrix, blocks, *(row[key] for key in TIMES), *ratios, row["excess"])


def main() -> None:
    args = parsed(parser(__doc__, device=True, repeats=3, layers=12), repeats=1, layers=1)
    layers, repeats = args.layers, max(1, args.repeats)
    d, heads = (128, 4) if args.smoke else (768, 12)
    where = machine(args.device)
    headline("certified norms against float64 svdvals", where)
    table = Table(
        *(("weights", "<8"), ("matrix", "<20"), ("blocks", "12"), ("svdvals s", "9.3f")),
        *(("tall s", "9.3f"), ("certified s", "9.3f"), ("ratio", "7.1f"), ("to tall", "7.1f")),
        ("excess", "8.1e"),
    )
    summary = {}
    for kind in ("gaussian", "capped"):
        rows: dict[str, dict[str, float]] = {}
        for matrix, shape in shapes(layers, d, heads).items():
            rows[matrix] = measure(weights(shape, kind).to(args.device), repeats, args.device)
            show(table, kind, matrix, "x".join(map(str, shape)), rows[matrix])
        total = {key: sum(row[key] for row in rows.values()) for key in TIMES}
        total["excess"] = max(row["excess"] for row in rows.values())
        show(table, kind, "all", "", total)
        to_svdvals, to_tall = (total[key] / total["upper_s"] for key in TIMES[:2])
        summary[kind] = {**total, "ratio": to_svdvals, "ratio_to_tall": to_tall}
    finish("linalg_speed", where, layers=layers, d=d, repeats=repeats, **summary)


if __name__ == "__main__":
    main()
