"""Figures of finished runs, of accuracies, of adapters under budgets, and of schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lip_plugin.certificate.robustness.accuracy import Accuracies
from lip_plugin.surgery.block_norms import block_norms


def plot_run(
    history: list[dict[str, Any]],
    model: nn.Module,
    path: str | Path,
    baselines: dict[str, float] | None = None,
) -> None:
    """Draw a run: losses and accuracy, the proven Lipschitz bound, and block norms over caps.

    Args:
        history: `trainer.state.log_history` of a run with LipschitzCallback.
        model: the model at its end. Its block norms (proven, RMS->RMS) are drawn over their caps.
        path: the file to write; its suffix says PNG, PDF or SVG.
        baselines: accuracies in [0, 1] by name, drawn as dotted lines beside `eval_accuracy`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def series(key: str) -> tuple[list[int], list[float]]:
        rows = [(row["step"], row[key]) for row in history if key in row]
        return [step for step, _ in rows], [value for _, value in rows]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    left.plot(*series("loss"), label="training loss (nats)")
    left.plot(*series("eval_loss"), "o-", label="validation loss (nats)")
    left.set(xlabel="step", title="loss and accuracy")
    shares = left.twinx()
    shares.plot(*series("eval_accuracy"), "s-", color="tab:green", label="validation accuracy")
    for name, value in (baselines or {}).items():
        shares.axhline(value, color="gray", linestyle=":", label=name)
    shares.set_ylim(0, None)
    lines = [*left.get_lines(), *shares.get_lines()]
    left.legend(lines, [str(line.get_label()) for line in lines], fontsize=8, loc="center right")
    middle.plot(*series("lip/log10_certificate"), label="from the weights")
    middle.plot(*series("lip/log10_certificate_caps"), "--", label="from the caps")
    middle.set(
        xlabel="step",
        ylabel="log10 of the bound",
        title="proven Lipschitz bound, embeddings to logits",
    )
    middle.legend(fontsize=8)
    norms = block_norms(model)
    right.barh(
        [n.name.removeprefix("transformer.") for n in norms], [n.worst_over_cap for n in norms]
    )
    right.axvline(1.0, color="tab:red", linestyle="--")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.set(title="largest block norm over its cap", xlim=(0, 1.1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_certified_accuracy(
    curves: dict[str, tuple[Accuracies, Accuracies]],
    path: str | Path,
    baselines: dict[str, float] | None = None,
    *,
    changed: str = "RMS norm that every token's embedding may move by",
) -> None:
    """Draw proven and surviving accuracy over eps. The truth lies between the two curves.

    Args:
        curves: (`certified_accuracy`, `attacked_accuracy`) of each model, by the model's name.
        path: the file to write.
        baselines: accuracies in [0, 1] by name, drawn as dotted lines.
        changed: a text that says what eps is the size of.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for i, (name, (certified, attacked)) in enumerate(curves.items()):
        color, label = f"C{i}", f"{name}: " if name else ""
        axes.plot(certified.eps, certified.accuracy, "o-", color=color, label=f"{label}proven")
        axes.plot(
            attacked.eps, attacked.accuracy, "s--", color=color, label=f"{label}survives the attack"
        )
        axes.axhline(
            attacked.clean,
            color=color,
            alpha=0.4,
            linewidth=1,
            label=f"{label}clean {attacked.clean:.1%}",
        )
        # With several models the areas would hide each other.
        if len(curves) == 1 and certified.eps == attacked.eps:
            axes.fill_between(
                certified.eps, certified.accuracy, attacked.accuracy, color=color, alpha=0.12
            )
    for name, value in (baselines or {}).items():
        axes.axhline(value, color="gray", linestyle=":", label=name)
    axes.set(
        xscale="log",
        xlabel=f"eps: {changed}",
        ylabel="accuracy",
        title="accuracy under any change of the input",
    )
    axes.set_ylim(0, None)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_budgets(rows: list[dict[str, float]], start: dict[str, float], path: str | Path) -> None:
    """Draw adapters under several budgets: losses on new and old data, and the drift of a logit.

    The drift is drawn twice, as proven and as found by an attack.

    Args:
        rows: for each budget a dictionary with `budget`, the losses `new` and `old`, `drift_upper`
            and `drift_lower`.
        start: the losses `new` and `old` of the base.
        path: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    budgets = [row["budget"] for row in rows]
    for key, colour in (("new", "tab:green"), ("old", "tab:blue")):
        left.plot(budgets, [row[key] for row in rows], "o-", color=colour, label=f"{key} text")
        left.axhline(start[key], color=colour, linestyle=":", label=f"{key} text, base")
    left.set(
        xscale="log", xlabel="budget: share of the base's own norms", title="validation loss (nats)"
    )
    right.plot(budgets, [row["drift_upper"] for row in rows], "o-", color="tab:red", label="proven")
    right.plot(
        budgets,
        [row["drift_lower"] for row in rows],
        "s--",
        color="gray",
        label="found by an attack",
    )
    right.set(
        xscale="log",
        yscale="log",
        xlabel="budget",
        title="drift of a logit, any input of the ball",
    )
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_retrofit(history: list[dict[str, Any]], marks: dict[str, float], path: str | Path) -> None:
    """Draw a pretrained model under a RetrofitSchedule: its loss, the schedule, the certificate.

    Args:
        history: `trainer.state.log_history` of a run with LipschitzCallback(schedule=...).
        marks: losses by name, drawn as dotted lines: with the norms, say, and after other ways of
            removing them.
        path: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def series(key: str) -> tuple[list[int], list[float]]:
        rows = [(row["step"], row[key]) for row in history if key in row]
        return [step for step, _ in rows], [value for _, value in rows]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    left.plot(*series("eval_loss"), "o-", label="while floors rise and caps tighten")
    for (name, value), colour in zip(
        marks.items(), ("black", "tab:red", "tab:orange"), strict=False
    ):
        left.axhline(value, color=colour, linestyle=":", label=f"{name}: {value:.2f}")
    left.set(xlabel="step", title="validation loss (nats)")
    left.legend(fontsize=8)
    middle.plot(*series("lip/steepest_norm"), label="steepest norm (Lipschitz constant)")
    middle.set_yscale("log")
    caps = middle.twinx()
    caps.plot(*series("lip/largest_cap"), color="tab:green", label="largest cap (RMS->RMS)")
    lines = [*middle.get_lines(), *caps.get_lines()]
    middle.legend(lines, [str(line.get_label()) for line in lines], fontsize=8)
    middle.set(xlabel="step", title="the schedule")
    right.plot(*series("lip/log10_certificate"), label="from the weights")
    right.plot(*series("lip/log10_certificate_caps"), "--", label="from the caps")
    right.set(xlabel="step", title="log10 of the proven Lipschitz bound")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
