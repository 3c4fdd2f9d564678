"""Run a script of this folder on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def on_two_processes(script: Path, folder: Path) -> None:
    """Run `script FOLDER` under torchrun, one thread each; fails the test if it fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*launcher, "--nproc_per_node", "2", str(script), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-6000:]
