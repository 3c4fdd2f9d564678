"""A nanoGPT checkout: its scripts, the files of a run, and how to be in its folder for a while."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKPOINT, SETTINGS, CERTIFICATE = "ckpt.pt", "lipschitz.json", "certificate.json"
SCRIPTS = ("train.py", "sample.py")


@contextmanager
def inside(folder: Path, argv: list[str]) -> Iterator[None]:
    """Be where a script run by hand in `folder` would be; then back, its modules forgotten."""
    cwd, old_argv, old_path, old_model = (
        os.getcwd(),
        sys.argv,
        list(sys.path),
        sys.modules.pop("model", None),
    )
    os.chdir(folder)
    sys.argv = argv
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(cwd)
        sys.argv, sys.path[:] = old_argv, old_path
        for name, module in list(sys.modules.items()):
            if (
                name != "__main__"
                and Path(getattr(module, "__file__", None) or "").parent == folder
            ):
                del sys.modules[name]
        if old_model is not None:
            sys.modules["model"] = old_model
