"""How far is training on several processes from training on one?

    python benchmarks/distributed_equality.py             # about three minutes on two cores
    python benchmarks/distributed_equality.py --smoke

The cases are those of tests/distributed/test_distributed.py. Each takes 20 steps on one process,
under DDP and under FSDP2 (gloo, 2 and 4 processes), of the same global batch, in float32 unless the
case says double. The table has the largest difference of any weight from the run on one process,
whether all processes hold the same bits, and by how much the certificates differ.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import torch
from common import ROOT, Table, finish, headline, machine, parser, torchrun

from tests.support.distributed_cases import CASES, train

SCRIPT = ROOT / "tests" / "support" / "distributed_cases.py"


def ranks_of(processes: int, names: list[str]) -> list[dict[str, Any]]:
    """What every process found."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun(processes, SCRIPT, folder, CASES=",".join(names), PYTHONPATH=str(ROOT))
        return [torch.load(f"{folder}/rank-{n}.pt", weights_only=True) for n in range(processes)]


def compared(
    name: str, how: str, alone: dict[str, Any], ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """One line of the table."""
    found = [rank[how][name] for rank in ranks]
    first = found[0]["weights"]
    bounds = [
        json.loads(run["certificate"])["certificate"]["lipschitz"] for run in (alone, found[0])
    ]
    return {
        "case": name,
        "how": how,
        "processes": len(ranks),
        "difference": max(float((first[n] - w).abs().max()) for n, w in alone["weights"].items()),
        "same_bits": all(
            torch.equal(first[n], w) for run in found for n, w in run["weights"].items()
        ),
        "same_certificates": all(run["certificate"] == found[0]["certificate"] for run in found),
        "certificate": abs(bounds[1] / bounds[0] - 1),
        "worst_over_cap": max(max(run["worst"]) for run in found),
    }


def main() -> None:
    smoke = parser(__doc__).parse_args().smoke
    torch.set_num_threads(1)
    where = machine()
    headline("several processes against one", where)
    names = list(CASES)[:1] if smoke else list(CASES)
    alone = {name: train(CASES[name]) for name in names}
    table = Table(
        *(("case", "<20"), ("how", "<8"), ("difference", "10.1e"), ("same bits", "")),
        *(("certificate", "11.1e"), ("over cap", "9.6f")),
    )
    rows = []
    for processes in (2,) if smoke else (2, 4):
        ranks = ranks_of(processes, names)
        for name in names:
            for how in ("ddp", "fsdp"):
                row = compared(name, how, alone[name], ranks)
                rows.append(row)
                keys = ("difference", "same_bits", "certificate", "worst_over_cap")
                table.row(name, f"{how} x {processes}", *(row[key] for key in keys))
    finish("distributed_equality", where, rows=rows)


if __name__ == "__main__":
    main()
