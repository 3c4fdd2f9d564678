"""The frontier's bound of an MLP is a bound, and its caps hold.

A run that was cut off goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import frontier
from frontier_tasks import char as frontier_char
from frontier_tasks import mlp as frontier_mlp
from frontier_tasks.runs import BUDGETS, RATES, Run, char_runs, mlp_runs
from frontier_tasks.table import draw, front, points, table

from lip_plugin import LipschitzConfig, certify
from lip_plugin.config_values import METHOD_NAMES
from tests.support.oracles import CAP_TOLERANCE, paper

pytest.importorskip("sklearn")
METHODS_BY_OPTIMIZER = list(itertools.product(METHOD_NAMES, RATES))


def options(tmp_path: Path, *more: str, task: str = "mlp"):
    words = ["--task", task, "--budget", "smoke", "--results", str(tmp_path / "rows.jsonl"), *more]
    return frontier.parse(words)


def trained(run: Run, steps: int = 6) -> frontier_mlp.Images:
    chosen = frontier.settings(frontier.parse(["--budget", "smoke"]))
    split = frontier_mlp.data(chosen, 0)
    return list(frontier_mlp.train(run, run.rates[-1], 0, split, chosen, steps))[-1]


def worst_norm(model: frontier_mlp.Images) -> float:
    """Largest RMS->RMS norm of its matrices, by a float64 SVD."""
    weights = [m.weight.detach().double() for m in model.maps]
    return max(
        float(torch.linalg.svdvals(w)[0]) * math.sqrt(w.shape[1] / w.shape[0]) for w in weights
    )


@pytest.mark.parametrize(("method", "optimizer"), METHODS_BY_OPTIMIZER)
def test_every_run_of_the_map_holds_its_caps(method: str, optimizer: str) -> None:
    model = trained(Run("", {"method": method, "w_max": 0.7}, optimizer, RATES[optimizer]))
    assert worst_norm(model) <= 0.7 * (1 + CAP_TOLERANCE)


@pytest.mark.parametrize("optimizer", RATES)
def test_a_baseline_starts_alike_and_leaves_the_caps(optimizer: str) -> None:
    model = trained(Run("", None, optimizer, RATES[optimizer]), steps=30)
    assert worst_norm(model) > 1.2  # the start's caps are 1
    assert not model.__dict__["lip_retrofit"].config.overrides


def test_the_graph_is_the_mlp_and_its_bounds_hold() -> None:
    """Against exact norms, and against the Jacobians at random images, both float64 SVDs."""
    model = trained(Run("", {"w_max": 1.5}, "lipschitz_muon", (0.2,)), steps=20)
    chosen = frontier.settings(frontier.parse(["--budget", "smoke"]))
    split = frontier_mlp.data(chosen, 0)
    x = split.held_out[0].double()
    graph, twin = frontier_mlp.graph_of(model), model.double()
    assert torch.allclose(
        graph.body.run(x[:, None])[:, 0], twin(x), rtol=0, atol=1e-12
    )  # float64 roundings
    bound = frontier_mlp.evaluate(model.float(), split, chosen)["bound"]
    exact = math.prod(
        float(torch.linalg.svdvals(m.weight.detach().double())[0])
        * math.sqrt(m.weight.shape[1] / m.weight.shape[0])
        for m in model.maps
    )
    assert (
        exact <= bound["weights"] <= exact * 1.002
    )  # a norm is proven to 0.1 %, and there are two
    assert bound["weights"] <= bound["caps"]
    jacobians = torch.func.vmap(torch.func.jacrev(model.double()))(x).detach()
    steepest = float(torch.linalg.svdvals(jacobians).max()) * math.sqrt(x.shape[1] / 10)
    assert 0.1 * bound["weights"] < steepest <= bound["weights"]


def test_certified_predictions_survive_and_without_the_certificate_they_would_not_all() -> None:
    model = trained(Run("", {"w_max": 1.5}, "lipschitz_muon", (0.2,)), steps=40)
    chosen = frontier.settings(frontier.parse(["--budget", "quick"]))
    found = frontier_mlp.evaluate(model, frontier_mlp.data(chosen, 0), chosen)
    assert found["eps"] == frontier_mlp.EPS
    for low, high in zip(found["certified"], found["attacked"], strict=True):
        assert low <= high <= found["accuracy"]
    assert found["certified"][0] > 0.5  # something is proven
    assert found["attacked"][-1] < found["accuracy"]  # and the attack finds something


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    chosen = options(tmp_path, "--only", "soft_cap/*/1", "--seeds", "2")
    frontier.work(chosen)
    whole = chosen.results.read_text()
    rows = frontier.read(chosen.results)
    assert [(r["name"], r["seed"]) for r in rows] == [
        (f"soft_cap/{o}/1", s) for s in (0, 1) for o in RATES
    ]
    frontier.work(chosen)
    assert chosen.results.read_text() == whole  # nothing is run twice
    chosen.results.write_text(whole[:-40])
    frontier.work(chosen)
    again = frontier.read(chosen.results)
    clock = ("seconds", "seconds_proving", "date")
    assert [{k: v for k, v in r.items() if k not in clock} for r in again] == [
        {k: v for k, v in r.items() if k not in clock} for r in rows
    ]


def test_the_rate_of_least_loss_is_chosen_on_the_first_seed_and_kept(tmp_path: Path) -> None:
    chosen = options(tmp_path, "--only", "hard_cap/*/2.5", "--seeds", "2")
    frontier.work(chosen)
    rows = frontier.read(chosen.results)
    for first, second in zip(rows[:3], rows[3:], strict=True):
        tried = {float(rate): loss for rate, loss in first["tried"].items()}
        assert set(tried) == set(RATES[first["run"]["optimizer"]])
        assert first["lr"] == min(tried, key=tried.__getitem__) == second["lr"]
        assert second["tried"] == {}


def test_another_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    chosen = options(tmp_path, "--only", "soft_cap/adamw/1")
    frontier.work(chosen)
    row = frontier.read(chosen.results)[0]
    row["run"]["config"]["w_max"] = 1.1
    chosen.results.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="soft_cap/adamw/1 was run as"):
        frontier.work(chosen)
    with pytest.raises(SystemExit, match="matches no run"):
        frontier.work(options(tmp_path, "--only", "nothing"))


def test_the_character_task_proves_what_it_states(tmp_path: Path) -> None:
    chosen = options(tmp_path, "--only", "soft_cap/*/1.2", task="char")
    frontier.work(chosen)
    chosen.only = ["unconstrained/*"]
    frontier.work(chosen)
    rows = frontier.read(chosen.results)
    assert [r["run"]["optimizer"] for r in rows] == [*RATES, "adamw", "muon"]
    for row in rows:
        constrained = row["run"]["config"] is not None
        assert ("caps" in row["log10_bound"]) == constrained
        if constrained:
            assert row["log10_bound"]["weights"] <= row["log10_bound"]["caps"]
        assert all(a <= b for a, b in zip(row["certified"], row["attacked"], strict=True))
        assert row["seen"] == 2 * 2 * 16


def test_the_character_model_of_the_larger_budgets_is_the_papers() -> None:
    for budget in ("quick", "small", "full"):
        assert (BUDGETS["char"][budget]["width"], BUDGETS["char"][budget]["length"]) == (256, 256)
    small = BUDGETS["char"]["small"]
    assert small["steps"] * small["batch"] * small["length"] == 3_072_000
    split = frontier_char.data(
        frontier.settings(frontier.parse(["--task", "char", "--budget", "smoke"])), 0
    )
    run = Run("", {"biases": "drop"}, "lipschitz_muon", (0.1,))
    chosen = frontier.settings(frontier.parse(["--task", "char", "--budget", "smoke"]))
    model = list(frontier_char.train(run, 0.1, 0, split, chosen, 1))[-1]
    assert len(model.transformer.h) == 3
    assert model.config.n_head == 4
    assert certify(model, "caps").lipschitz < math.inf


def test_names_are_keys_and_configs_are_configs() -> None:
    for runs in (mlp_runs(), char_runs()):
        assert len({run.name for run in runs}) == len(runs)
        for run in runs:
            assert run.optimizer in RATES
            config = dict(run.config or {})
            preset = config.pop("preset", None)
            LipschitzConfig.preset(preset, **config) if preset else paper(**config)
            assert json.loads(json.dumps(run.plain())) == run.plain()
    pairs = {(run.config["method"], run.optimizer) for run in mlp_runs() if run.config}
    assert pairs == set(METHODS_BY_OPTIMIZER)


def test_the_committed_data_are_of_the_table_and_consistent(tmp_path: Path) -> None:
    rows = [row for path in frontier.RESULTS.values() for row in frontier.read(path)]
    assert len(rows) > 100
    runs = {"mlp": {r.name: r for r in mlp_runs()}, "char": {r.name: r for r in char_runs()}}
    for row in rows:
        assert row["run"] == runs[row["task"]][row["name"]].plain(), row["name"]
        assert all(a <= b for a, b in zip(row["certified"], row["attacked"], strict=True)), row[
            "name"
        ]
        if "caps" in row["bound"]:
            assert row["bound"]["weights"] <= row["bound"]["caps"], row["name"]
    mlp = [row for row in rows if row["task"] == "mlp"]
    draw(mlp, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert max(map(len, table(mlp).splitlines())) <= 132  # fits a terminal


def test_the_front_is_what_nothing_else_beats() -> None:
    found = [p for p in points(frontier.read(frontier.RESULTS["mlp"])) if p.constrained]
    kept = front(found)
    for p in found:
        beaten = any(q.bound <= p.bound and q.accuracy >= p.accuracy and q is not p for q in found)
        assert (p in kept) or beaten
        assert not (
            p in kept and any(q.bound <= p.bound and q.accuracy > p.accuracy for q in found)
        )
