"""Every kind of node has a rule of its own for every analysis, or is refused by name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

import lip_plugin.certificate.graph as graph_room
import lip_plugin.certificate.robustness.attention_rule  # noqa: F401 (registers the rule of attention)
from lip_plugin.certificate.diagnostics.activation_report import reach
from lip_plugin.certificate.diagnostics.rounding import rounding
from lip_plugin.certificate.drift.rules import eta, through
from lip_plugin.certificate.graph.analysis import Analysis
from lip_plugin.certificate.graph.base import Node
from lip_plugin.certificate.robustness.rules import move
from lip_plugin.errors import LipschitzError


def kinds() -> set[type]:
    """Every class of node in the graph's room, found by looking into all of its files."""
    found: set[type] = set()
    for info in pkgutil.iter_modules(graph_room.__path__):
        module = importlib.import_module(f"{graph_room.__name__}.{info.name}")
        found |= {
            v
            for v in vars(module).values()
            if isinstance(v, type) and issubclass(v, Node) and v is not Node
        }
    return found


KINDS = sorted(kinds(), key=lambda kind: kind.__name__)
ANALYSES: dict[str, tuple[Analysis, ...]] = {
    "local movement": (move,),
    "drift": (eta, through),
    "rounding": (rounding,),
    "reach of activations": (reach,),
}
# Refused by name, each with its reason. Empty: every node has a rule for every analysis.
REFUSED: dict[tuple[str, str], str] = {}


def test_there_are_nodes() -> None:
    assert {"Linear", "Attention", "GatedMlp", "MlpResidual", "AttentionOut", "Parallel"} <= {
        k.__name__ for k in KINDS
    }


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_node_has_a_rule_or_is_refused_by_name(kind: type, analysis: str) -> None:
    has = any(kind in table.kinds() for table in ANALYSES[analysis])
    assert has != ((kind.__name__, analysis) in REFUSED), (
        f"{kind.__name__} was forgotten by {analysis}"
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_node_runs_and_bounds(kind: Any) -> None:
    assert kind.run is not Node.run
    assert kind.bound is not Node.bound


class Unknown(Node):
    name = "unknown"


@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_node_without_a_rule_is_refused_by_name(analysis: str) -> None:
    for table in ANALYSES[analysis]:
        with pytest.raises(LipschitzError, match="Unknown"):
            table(Unknown())


def test_a_subclass_inherits_no_rule() -> None:
    """A new kind of node that extends another one has no rules, and nothing is proven of it."""
    linear = next(kind for kind in KINDS if kind.__name__ == "Linear")
    louder: Any = type("Louder", (linear,), {})
    for tables in ANALYSES.values():
        assert not any(louder in table.kinds() for table in tables)


def test_a_kind_has_one_rule() -> None:
    table = Analysis("test", lambda node: ValueError(node))
    table.rule(Unknown)(lambda node: 1)
    with pytest.raises(TypeError, match="has a rule already"):
        table.rule(Unknown)(lambda node: 2)
