"""Where lip_plugin meets other people's libraries; importable as `lip_plugin.integrations`.

`register_all` runs when lip_plugin is imported. It registers the families (plain data) at once, and
the loader of saved models as soon as transformers is imported, now or later.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HOOKED = "transformers.quantizers.auto"


def register_all() -> None:
    """Register families and saved-model loading; cheap, and safe to call again."""
    import lip_plugin.integrations.bitsandbytes
    import lip_plugin.integrations.huggingface.families
    import lip_plugin.integrations.nanogpt.family
    import lip_plugin.integrations.peft.enforce
    import lip_plugin.integrations.peft.wrappers  # noqa: F401

    if _HOOKED in sys.modules:
        _register_persistence()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register_persistence() -> None:
    """By importing it; where that import itself has brought transformers in, it registers at its end."""
    import_module("lip_plugin.integrations.huggingface.saving")


class _AfterImport(MetaPathFinder):
    """Registers our loader right after transformers' quantizers are first imported.

    Importing transformers costs seconds, and nanoGPT users never need it; yet a saved model must
    load with nothing but `import lip_plugin`, in either order of the imports.
    """

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _HOOKED:
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
        _register_persistence()

    loader.exec_module = exec_module  # type: ignore[method-assign]
