"""Every room imports from the rooms below it only, and every file has a room.

Nothing imports in a circle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. A room may import from itself and from what stands before it.
FLOORS = (
    "ground",  # the files of lip_plugin/ itself: errors, config, progress, files, face
    "linalg",
    "distributed",
    "model",
    "surgery",
    "certificate",
    "optim",
    "training",
    "integrations",
    "cli",
)
FACE = {
    "lip_plugin",
    "lip_plugin.__main__",
}  # the door: it imports from every room, and no room imports it


def modules() -> dict[str, Path]:
    """Dotted name -> file of everything that is installed."""
    found = {}
    for folder, prefix in (
        (ROOT / "lip_plugin", "lip_plugin"),
        (ROOT / "integrations", "lip_plugin.integrations"),
    ):
        for path in folder.rglob("*.py"):
            relative = path.relative_to(folder)
            if folder.name == "lip_plugin" and relative.parts[0] == "integrations":
                continue  # a link that some checkouts have
            name = ".".join((prefix, *relative.with_suffix("").parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in FLOORS:
        return parts[1]
    return "ground"


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """Modules of ours that a file imports, in all of it or only when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: a relative import hides which room it is from")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def upward(path: Path, module: str) -> list[str]:
    """What a file imports from above its own floor."""
    own = FLOORS.index(room(module))
    ours = [m for m in imports(path, everywhere=True) if m.split(".")[0] == "lip_plugin"]
    return [m for m in ours if m in FACE or FLOORS.index(room(m)) > own]


@pytest.mark.parametrize("module", sorted(set(MODULES) - FACE))
def test_imports_point_down(module: str) -> None:
    assert upward(MODULES[module], module) == []


def test_a_wrong_import_is_seen(tmp_path: Path) -> None:
    """A proof that imports an optimizer is seen, even inside a function."""
    for text in (
        "from lip_plugin.optim.muon import LipschitzMuon\n",
        "def f():\n    import lip_plugin.training.losses\n",
        "from lip_plugin import certify\n",
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from lip_plugin.cli import commands\n",
    ):
        file = tmp_path / "wrong.py"
        file.write_text(text)
        assert len(upward(file, "lip_plugin.certificate.wrong")) == 1, text


def test_nothing_is_imported_in_a_circle() -> None:
    edges = {
        m: {i for i in imports(p, everywhere=False) if i in MODULES and i != m}
        for m, p in MODULES.items()
    }
    state: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"a circle: {' -> '.join((*way, module))}"
        if module in state:
            return
        state[module] = 1
        for other in sorted(edges[module]):
            visit(other, (*way, module))
        state[module] = 2

    for module in sorted(set(MODULES) - FACE):
        visit(module, ())


def test_every_folder_says_what_it_is() -> None:
    for name, path in MODULES.items():
        document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert document is not None, name
        assert "TODO" not in document, name


def test_the_core_names_no_class_of_a_library() -> None:
    """No model class of transformers is written in the core.

    Facts of a family stand with the family.
    """
    words = ("GPT2", "Llama", "Gemma", "OPTLearned", "Conv1D", "Roberta", "nanoGPT's LayerNorm")
    for name, path in MODULES.items():
        if name.startswith("lip_plugin.integrations"):
            continue
        strings = [
            n.value
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and " " not in n.value
        ]
        assert not [s for s in strings for word in words if word in s], name


def test_files_are_of_a_readable_length() -> None:
    """Files are of a readable length, about 300 lines.

    The tests of a long room are split before it grows further.
    """
    long = {n: len(p.read_text().splitlines()) for n, p in MODULES.items()}
    assert {n: count for n, count in long.items() if count > 400} == {}
