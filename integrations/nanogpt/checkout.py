"""A nanoGPT checkout: the names of its files, and a way to run code as if in its folder."""

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
    """Run the body as a script that was started by hand in `folder`.

    Afterwards the working directory, sys.argv and sys.path are as before, and the modules that were
    imported from `folder` are forgotten.
    """
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
