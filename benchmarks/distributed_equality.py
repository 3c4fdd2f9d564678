"""How far training on several processes is from training on one: the cases of tests/distributed/test_distributed.py, as a table.

    python benchmarks/distributed_equality.py             # 2 and 4 processes, gloo; about three minutes on two cores
    python benchmarks/distributed_equality.py --smoke

20 steps of each case on one process, under DDP, and under FSDP2, of the same global batch; float32 unless the case
says double. Printed: the largest difference of any weight from the run on one process, whether all processes hold the
same bits, and by how much the certificates differ.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from tests.support.distributed_cases import CASES, train  # noqa: E402 (the tests' own cases)


def ranks_of(processes: int, names: list[str]) -> list[dict[str, Any]]:
    """What every process found."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CASES": ",".join(names)}
    with tempfile.TemporaryDirectory() as folder:
        script = [str(TESTS / "distributed_cases.py"), folder]
        result = subprocess.run(
            [*command, *script], env=environment, capture_output=True, text=True
        )
        if result.returncode:
            raise SystemExit(result.stderr[-3000:])
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    names = list(CASES)[:1] if smoke else list(CASES)
    alone = {name: train(CASES[name]) for name in names}
    rows = []
    for processes in (2,) if smoke else (2, 4):
        ranks = ranks_of(processes, names)
        rows += [
            compared(name, how, alone[name], ranks) for name in names for how in ("ddp", "fsdp")
        ]
    print(
        f"{'case':<20} {'how':<9} {'difference':>11} {'same bits':>10} {'certificate':>12} {'over cap':>9}"
    )
    for row in rows:
        how = f"{row['how']} x {row['processes']}"
        print(
            f"{row['case']:<20} {how:<9} {row['difference']:>11.1e} {row['same_bits']!s:>10} "
            f"{row['certificate']:>12.1e} {row['worst_over_cap']:>9.6f}"
        )
    result = {
        "benchmark": "distributed_equality",
        "rows": rows,
        "device": platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps({**result, "date": datetime.date.today().isoformat()}))


if __name__ == "__main__":
    main()
