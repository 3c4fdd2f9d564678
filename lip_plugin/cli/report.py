"""The HTML page that `lip-plugin report` writes about a run.

The page says what is proven, what an attack attained, what each layer contributes, how the logged
quantities went, and which weights and versions it is about. It is one file that needs neither a
network nor a script, because its charts are SVG inside the page. Names of layers, models and
versions come from outside and are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from lip_plugin.certificate.attack.falsify import Falsification
from lip_plugin.certificate.result import Certificate
from lip_plugin.cli.charts import (
    ATTAINED,
    FROM_CAPS,
    OTHER,
    PROVEN,
    SECOND,
    bars,
    interval,
    lines,
    number,
)

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p.sub, figcaption, .note { color: #4b5563; } p.big { font-size: 1.25rem; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: .18rem .5rem; border-bottom: 1px solid #e5e7eb; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.bar { width: 30%; text-align: left; }
td.bar span { display: inline-block; height: .7rem; background: #1d4ed8; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
table.id td { white-space: normal; text-align: left; }
.bad { color: #b91c1c; font-weight: 600; }
code { font-size: 12px; word-break: break-all; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; }
  h2, tr, svg { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class _Curve:
    """One logged quantity: its label, its key in the log, and how it is drawn."""

    label: str
    key: str
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class _Chart:
    """One chart of the log. `logs` says that the log holds base-10 logarithms."""

    title: str
    ylabel: str
    curves: tuple[_Curve, ...]
    limit: tuple[str, float] | None = None
    logs: bool = False


_CHARTS = (
    _Chart(
        "loss",
        "nats",
        (_Curve("training", "loss", OTHER), _Curve("validation", "eval_loss", SECOND)),
    ),
    _Chart(
        "proven Lipschitz bound, embeddings to logits",
        "token norm to token norm",
        (
            _Curve("from the weights", "lip/log10_certificate", PROVEN),
            _Curve("from the caps", "lip/log10_certificate_caps", FROM_CAPS, dashed=True),
        ),
        logs=True,
    ),
    _Chart(
        "largest block norm over its cap",
        "RMS->RMS norm / cap",
        (_Curve("norm / cap", "lip/worst_norm_over_cap", PROVEN),),
        limit=("cap", 1.0),
    ),
    _Chart(
        "attention entropy of a full row",
        "nats",
        (
            _Curve("smallest seen", "lip/attention_entropy_seen", ATTAINED),
            _Curve("proven lower bound", "lip/attention_entropy_proven", PROVEN, dashed=True),
        ),
    ),
    _Chart(
        "largest activation seen",
        "absolute value of an entry",
        (_Curve("activation", "lip/largest_activation", ATTAINED),),
    ),
    _Chart("validation accuracy", "share", (_Curve("accuracy", "eval_accuracy", SECOND),)),
)
_LAYERS_ABOUT = (
    "<h2>Layer by layer</h2><p>Constants multiply from top to bottom; the last column is the "
    "base-10 logarithm of the bound up to and including the layer. A residual block's constant "
    "includes its residual connection.</p>"
)
_LAYERS_HEAD = "<th>layer</th><th>radius in</th><th>constant</th><th>log10 total</th><th></th>"


@dataclass(frozen=True)
class Report:
    """What a page is made of.

    Attributes:
        title: title of the page.
        certificate: the certificate from the weights.
        caps: the certificate from the caps, or a sentence that says why there is none.
        norms: for each layer of a retrofitted model its name and its largest proven block norm
            (RMS->RMS) over its cap.
        history: `log_history` of the Trainer, or [] without one.
        attack: what `falsify` found, or None if there was no attack.
        effort: how long the attack looked, in words.
        versions: versions of libraries, and what else identifies the run.
    """

    title: str
    certificate: Certificate
    caps: Certificate | str
    norms: Sequence[tuple[str, float]] = ()
    history: Sequence[Mapping[str, Any]] = ()
    attack: Falsification | None = None
    effort: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def falsified(self) -> bool:
        """Whether the attack exceeded the bound, which would be a defect of lip_plugin."""
        return self.attack is not None and self.attack.lower_bound > self.certificate.lipschitz


def render(report: Report) -> str:
    """Write the page.

    Returns:
        The page as HTML text, in one piece.

    Raises:
        ImportError: matplotlib is not installed.
    """
    sections = [
        _proven(report),
        _attack(report),
        _layers(report.certificate),
        _curves(report.history),
        bars(
            report.norms,
            "largest proven norm of each layer's blocks over its cap",
            "RMS->RMS norm / cap",
            ("cap", 1.0),
        ),
        _identity(report),
    ]
    title = escape(report.title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{title}</h1><p class="sub">Lipschitz report of {escape(report.certificate.model)}</p>'
        + "\n".join(section for section in sections if section)
        + "</body></html>\n"
    )


def bound_text(certificate: Certificate) -> str:
    """Write a bound, rounded up: as a number below a million, as a power of ten from there on."""
    if certificate.log10_lipschitz < 6:
        return number(certificate.lipschitz, "up")
    if math.isfinite(certificate.log10_lipschitz):
        return f"10^{math.ceil(certificate.log10_lipschitz * 100) / 100:.2f}"
    return "infinite: nothing is proven"


def _proven(report: Report) -> str:
    c = report.certificate
    visible = 128
    if isinstance(report.caps, Certificate):
        caps = (
            f"From the caps alone the bound is <b>{bound_text(report.caps)}</b> on token norms up "
            f"to {report.caps.radius:.9g}; it holds at every step of a run under these caps, under "
            "the assumptions below."
        )
    else:
        caps = f"There is no bound from caps: {escape(report.caps)}"
    assumptions = list(c.assumptions)
    if isinstance(report.caps, Certificate):
        assumptions += [
            f"(from caps) {a}" for a in report.caps.assumptions if a not in c.assumptions
        ]
    bound, entropy = bound_text(c), number(c.smallest_entropy_lower(visible), "down")
    return (
        '<h2>What is proven</h2><p class="big">Lipschitz constant, embeddings to logits: at most '
        f"<b>{bound}</b></p>"
        "<p>Take any two inputs of the first block, of the same length, in which every token has "
        f"an RMS norm of at most {c.radius!r}. Then no token's logits differ (in RMS norm) by more "
        f"than {bound} times the largest difference (in RMS norm) of a token of the inputs. Every "
        "input made of the model's own tokens is such an input. It holds for any attention mask, "
        "with or without a key-value cache.</p>"
        f"<p>{caps}</p>"
        "<p>All attention logits of a row lie, up to a shift that softmax does not see, within "
        f"+-{number(c.attention_logit, 'up')}. So the entropy of an attention row over {visible} "
        f"tokens is at least {entropy} nats, of {number(math.log(visible))} possible.</p>"
        "<p>What this takes for granted:</p><ul>"
        + "".join(f"<li>{escape(a)}</li>" for a in assumptions)
        + "</ul>"
    )


def _attack(report: Report) -> str:
    if report.attack is None:
        return ""
    lower, c = report.attack.lower_bound, report.certificate
    attained, bound = number(lower, "down"), bound_text(c)
    if report.falsified:
        verdict = (
            f'<p class="bad">The attack attains {number(lower)}, more than the bound: the '
            "certificate is wrong. Please report this model to the authors of lip_plugin.</p>"
        )
    else:
        ratio = c.log10_lipschitz - math.log10(lower) if lower > 0 else math.inf
        factor = number(10**ratio) if ratio < 6 else f"10^{ratio:.1f}"
        verdict = (
            f"<p>An attack found two such inputs whose logits differ <b>{attained}</b> times as "
            f"much as they do. So the true constant lies between {attained} and {bound}, "
            f"a factor of {factor} apart.</p>"
        )
    chart = interval(
        (f"attained by the attack: {attained}", math.log10(lower) if lower > 0 else -math.inf),
        (f"proven from the weights: {bound}", c.log10_lipschitz),
        "the attack is above the bound"
        if report.falsified
        else "the true constant lies between these two",
        "Lipschitz constant, token norm of embeddings to token norm of logits",
    )
    effort = f'<p class="note">{escape(report.effort)}</p>'
    return f"<h2>Attacked from below</h2>{verdict}{effort}{chart}"


def _layers(certificate: Certificate) -> str:
    finite = [abs(row.log10_total) for row in certificate.layers if math.isfinite(row.log10_total)]
    top = max([*finite, 1e-9])
    body = []
    for row in certificate.layers:
        share = abs(row.log10_total) / top if math.isfinite(row.log10_total) else 1.0
        cells = (
            escape(row.name),
            number(row.radius, "up"),
            number(row.lipschitz, "up"),
            f"{row.log10_total:.3f}",
        )
        bar = f'<td class="bar"><span style="width:{100 * share:.1f}%"></span></td>'
        body.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}{bar}</tr>")
    return (
        f"{_LAYERS_ABOUT}<table><thead><tr>{_LAYERS_HEAD}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    charts = [
        lines(
            {curve.label: _series(history, curve.key) for curve in chart.curves},
            chart.title,
            chart.ylabel,
            limit=chart.limit,
            colors={curve.label: curve.color for curve in chart.curves},
            dashed=[curve.label for curve in chart.curves if curve.dashed],
            from_zero=chart.limit is not None,
            logs=chart.logs,
        )
        for chart in _CHARTS
    ]
    charts = [f"<div>{c}</div>" for c in charts if c]
    if not charts:
        return '<h2>The run</h2><p class="note">No log of a Trainer lies beside the model.</p>'
    return f'<h2>The run</h2><div class="charts">{"".join(charts)}</div>'


def _series(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    rows = [(row.get("step"), row.get(key)) for row in history if isinstance(row, Mapping)]
    return [(float(x), float(y)) for x, y in rows if _is_number(x) and _is_number(y)]  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _identity(report: Report) -> str:
    rows = [*report.versions.items(), ("fingerprint of the weights", report.certificate.weights)]
    rows += [(f"setting {k}", str(v)) for k, v in report.certificate.settings.items()]
    body = "".join(
        f"<tr><td>{escape(k)}</td><td><code>{escape(v)}</code></td></tr>" for k, v in rows
    )
    return f'<h2>What this is about</h2><table class="id"><tbody>{body}</tbody></table>'
