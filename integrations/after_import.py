"""Registers the loader of saved models as soon as transformers has been imported.

A saved model has to load with nothing but `import lip_plugin`, in either order of the two imports.
Importing transformers costs seconds, and users of nanoGPT never need it. So this file does not
import it; it waits until somebody else does.

Python asks every finder in `sys.meta_path` at the first import of a module. If transformers is not
there yet, a finder of ours waits in that list. It removes itself when it is asked for transformers'
table of quantizers, and the loader is registered right after that module has run.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TABLE = "transformers.quantizers.auto"


def register_saving() -> None:
    """Make saved models loadable, at once if transformers is there, or else as soon as it is.

    It is safe to call again.
    """
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    """Import the module that registers. It may also be in the middle of its own import."""
    import_module("lip_plugin.integrations.huggingface.saving")


class _AfterImport(MetaPathFinder):
    """A finder that waits for the import of transformers' table of quantizers."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            _run_after(spec.loader)
        return spec


def _run_after(loader: Loader) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _register()

    loader.exec_module = exec_module  # type: ignore[method-assign]
