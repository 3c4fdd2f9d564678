"""Registers the loader of saved models right after transformers is imported, now or later.

A saved model must load with nothing but `import lip_plugin`, in either order of the two imports. Importing transformers
costs seconds, and users of nanoGPT never need it, so it is not imported here. Python has one place that is asked at every
first import, `sys.meta_path`: if transformers is not there yet, one finder waits in it, and takes itself off
when transformers' table of quantizers has been imported.
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
    """Have saved models load: at once if transformers is there, else as soon as it is. Safe to call again."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    """By importing it; where that import itself has brought transformers in, it registers at its end."""
    import_module("lip_plugin.integrations.huggingface.saving")


class _AfterImport(MetaPathFinder):
    """Waits for the import of transformers' table of quantizers."""

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
