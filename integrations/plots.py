"""Figures: a finished run (loss, certificate, norms against caps), and certified against attacked accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lip_plugin.certificate.robustness import Accuracies
from lip_plugin.optim.projection import block_norms


def plot_run(
    history: list[dict[str, Any]],
    model: nn.Module,
    path: str | Path,
    baselines: dict[str, float] | None = None,
) -> None:
    """Draw a run into `path` (PNG, PDF or SVG by its suffix).

    Args:
        history: `trainer.state.log_history` of a run with LipschitzCallback.
        model: the model as it ended, for its blocks' norms (proven, RMS->RMS) over their caps.
        baselines: accuracies in [0, 1] to draw as dotted lines beside `eval_accuracy`.
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
        xlabel="step", ylabel="log10 of the bound", title="proven Lipschitz bound, embeddings to logits"
    )
    middle.legend(fontsize=8)
    norms = block_norms(model)
    right.barh([n.name.removeprefix("transformer.") for n in norms], [n.worst_over_cap for n in norms])
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
    """Draw proven and surviving accuracy over eps into `path`; the truth lies between the two curves.

    Args:
        curves: for each model's name its (`certified_accuracy`, `attacked_accuracy`).
        baselines: accuracies in [0, 1] to draw as dotted lines.
        changed: what eps is the size of.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for i, (name, (certified, attacked)) in enumerate(curves.items()):
        color, label = f"C{i}", f"{name}: " if name else ""
        axes.plot(certified.eps, certified.accuracy, "o-", color=color, label=f"{label}proven")
        axes.plot(attacked.eps, attacked.accuracy, "s--", color=color, label=f"{label}survives the attack")
        axes.axhline(
            attacked.clean, color=color, alpha=0.4, linewidth=1, label=f"{label}clean {attacked.clean:.1%}"
        )
        if len(curves) == 1 and certified.eps == attacked.eps:  # of several the areas would hide each other
            axes.fill_between(certified.eps, certified.accuracy, attacked.accuracy, color=color, alpha=0.12)
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
