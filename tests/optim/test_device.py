"""A step of LipschitzMuon reads one value from its device, and makes no tensor elsewhere.

The device is a pretended one (tests/support/pretend_device.py), so no GPU is needed.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch.utils.backend_registration as registration

pytestmark = pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot pretend a device",
)


def test_the_presets_methods_read_nothing_but_the_guard() -> None:
    """Other methods prove each result by a factorization whose success the host has to know."""
    free = [f"{m}:{f}" for m in ("stiefel", "soft_cap") for f in ("gpt2", "llama", "bert")]
    reading = ["hard_cap:gpt2", "spectral_normalize:gpt2"]  # so the test can fail
    words = [sys.executable, "-m", "tests.support.pretend_device", *free, *reading]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [f"{words} no read of a value" for words in free]
    said += [f"{words} reads: aten._local_scalar_dense.default" for words in reading]
    assert done.stdout.splitlines() == said
