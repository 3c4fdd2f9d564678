"""What importing costs, which way imports point, and what an installation contains."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lip_plugin
from lip_plugin import errors

ROOT = Path(lip_plugin.__file__).resolve().parent
INTEGRATIONS = Path(importlib.import_module("lip_plugin.integrations").__file__).resolve().parent
PUBLIC = {
    *("LipschitzConfig", "retrofit", "release", "project_", "attach_projection", "LipschitzMuon"),
    *("certify", "falsify", "Certificate", "LipschitzCallback"),
}
# One direction: a package may import those to its left (and itself).
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "accelerate", "peft", "datasets"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    """A fresh interpreter, in a folder that is not the repository, with warnings as errors."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_every_public_name_resolves_and_none_is_missing():
    assert set(lip_plugin.__all__) >= PUBLIC
    for name in lip_plugin.__all__:
        assert getattr(lip_plugin, name) is not None
        assert name in dir(lip_plugin)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lip_plugin.no_such_name


def test_every_error_is_a_lipschitz_error():
    found = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(found) >= 8
    assert all(issubclass(e, errors.LipschitzError) for e in found)


def test_importing_the_package_does_not_import_transformers(tmp_path):
    code = (
        "import sys, lip_plugin; lip_plugin.retrofit; lip_plugin.LipschitzMuon; "
        "lip_plugin.certify\n"
    )
    code += (
        "heavy = {'transformers', 'accelerate', 'peft', 'datasets', 'matplotlib'} "
        "& set(sys.modules)\n"
    )
    result = run(code + "assert not heavy, heavy", tmp_path)
    assert result.returncode == 0, result.stderr


def test_without_transformers_the_core_works_on_a_nanogpt(tmp_path):
    """The core works where neither transformers nor accelerate can be imported.

    It retrofits, trains, projects and certifies a nanoGPT.
    """
    code = f"""{BLOCKER}
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
from tests.support.families import tiny
from tests.support.oracles import (loss_of, worst_over_cap, paper)
from lip_plugin import LipschitzConfig, LipschitzMuon, certify, project_, release, retrofit
from lip_plugin import attach_projection, falsify
import lip_plugin.linalg.norms, lip_plugin.linalg.polar, lip_plugin.linalg.projections
model = tiny("nanogpt")
retrofit(model, paper(w_max=1.5))
optimizer, ids = LipschitzMuon(model), torch.randint(67, (2, 12))
for _ in range(3):
    loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()
project_(model)
assert worst_over_cap(model) <= 1.001
assert certify(model).lipschitz > 0
release(model)
try:
    from lip_plugin import LipschitzCallback
except ImportError as error:
    print("refused:", error)
assert "transformers" not in sys.modules
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "refused: blocked: transformers" in result.stdout


def test_the_integrations_are_importable_under_the_package_only(tmp_path):
    code = "import lip_plugin.integrations\n"
    code += "try:\n    import integrations\nexcept ImportError:\n    print('absent')"
    result = run(code, tmp_path)
    assert result.stdout.strip() == "absent", result.stderr


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").exists()


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Every import statement, as the module and whether it runs at import time.

    Those for type checkers only are left out.
    """
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = top and not isinstance(
                child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
            )
            if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.append((child.module, top))
                found.extend((f"{child.module}.{alias.name}", top) for alias in child.names)
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def core_files() -> list[Path]:
    return [
        p
        for p in sorted(ROOT.rglob("*.py"))
        if INTEGRATIONS not in p.parents and "integrations" not in p.parts
    ]


def test_the_core_never_imports_the_integrations_nor_what_they_plug_into():
    assert len(core_files()) > 15
    for path in core_files():
        for name, _ in imports_of(path):
            assert name.partition(".")[0] not in (
                "transformers",
                "accelerate",
                "peft",
                "datasets",
            ), path
            if path != ROOT / "__init__.py" and path.parent.name != "cli":
                assert not name.startswith("lip_plugin.integrations"), path


def test_the_library_imports_nothing_but_its_dependencies():
    allowed = {"torch", "tqdm", "lip_plugin", *sys.stdlib_module_names}
    for path in core_files():
        extra = {"matplotlib"} if path.name == "charts.py" else set()  # with the extra "plots"
        for name, _ in imports_of(path):
            assert name.partition(".")[0] in allowed | extra, f"{path.name} imports {name}"


def test_the_library_logs_and_never_prints():
    for path in [*core_files(), *INTEGRATIONS.glob("huggingface/*.py")]:
        if path.parent.name == "cli":
            continue
        calls = [
            n
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Call)
        ]
        assert not any(getattr(c.func, "id", "") == "print" for c in calls), path


def test_sources_are_ascii():
    for folder in (ROOT, INTEGRATIONS, Path(__file__).parent):
        for path in folder.rglob("*.py"):
            assert path.read_text(encoding="utf-8").isascii(), path


@pytest.mark.parametrize("first", ["lip_plugin", "transformers.quantizers.auto", "transformers"])
def test_saved_models_load_in_any_order_of_imports(first, tmp_path):
    """The loader registers whether it, transformers, or lip_plugin is imported first, and once."""
    code = f"""
import {first}
import lip_plugin.integrations.huggingface.saving as ours
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING[ours.METHOD] is ours.LipschitzLoader
"""
    assert (result := run(code, tmp_path)).returncode == 0, result.stderr
