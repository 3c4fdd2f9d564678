"""`Certificate`: the proven numbers, and the model that they belong to.

Their form as JSON is in lip_plugin/stated.py.

The functions in front of the class check a certificate. `check_belongs` asks whether it was
computed from a given model. `check_same` compares a stated certificate with one that was computed
anew. Each raises CertificateError with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lip_plugin.certificate.comparison.compare import check_graph
from lip_plugin.certificate.fingerprint import (
    differences,
    fingerprint,
    settings_with_function,
)
from lip_plugin.certificate.graph.attention import smallest_entropy_lower
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.graph.decimals import div, mul, root, to_float, up
from lip_plugin.certificate.weight_norms import CAP_SLACK
from lip_plugin.distributed.gather import has_shards, on_first_process
from lip_plugin.errors import CertificateError, ConfigError, NotRetrofittedError
from lip_plugin.face import require_module
from lip_plugin.model.adapters import BlockNorms
from lip_plugin.stated import Stated
from lip_plugin.surgery.block_norms import block_norms

# How far the log10 of a stated bound may lie below that of the recomputed one: by this number, plus
# this share of the stated log10. Proven norms may be up to 0.1 % too high, by another amount on
# another machine, and a bound is a product of many of them. A bound that is stated below this
# margin was not computed from these weights by these rules.
_REPRODUCED = 0.01


def check_settings(certificate: Certificate, settings: Mapping[str, Any]) -> None:
    """Raise CertificateError if a certificate was computed under other settings than these.

    The message names the fields that differ.
    """
    wrong = differences(certificate.settings, settings)
    if wrong:
        raise CertificateError(
            "the certificate belongs to a model with other settings: "
            f"{'; '.join(wrong[:5])}. The config was changed after it was written: restore the "
            "config, or certify again if the change was meant."
        )


def check_belongs(certificate: Certificate, model: nn.Module) -> None:
    """Raise CertificateError unless the certificate was computed from this very model.

    The settings must be the same, and the model must still compute what its graph computes. A
    certificate from weights needs the same bytes in every parameter and persistent buffer. One from
    caps needs the same structure, caps and uncapped tensors, and every block within its cap now.
    """
    with torch.no_grad():
        graph = build(model)
        check_settings(certificate, settings_with_function(graph))
        check_fingerprint(certificate, fingerprint(graph.root, certificate.source))
        check_graph(graph)
        if certificate.source == "caps":
            check_within_caps(graph.root)


def check_within_caps(root: nn.Module, norms: Iterable[BlockNorms] | None = None) -> None:
    """Raise CertificateError unless every block is within its cap now, up to `CAP_SLACK`.

    Args:
        root: the model of a known family, without wrappers.
        norms: what `block_norms(root)` gave, if the blocks were measured already.
    """
    try:
        measured = block_norms(root) if norms is None else list(norms)
    except NotRetrofittedError as error:
        raise CertificateError(
            "This model has no caps, so nothing can be said from caps alone. Use "
            "source='weights', or retrofit(model)."
        ) from error
    # The name "<layer> (change)" is about the change that an adapter makes. The budget of a change
    # bounds a drift, and it is no cap.
    capped_blocks = [b for b in measured if not b.name.endswith(" (change)")]
    worst = max(capped_blocks, key=lambda b: b.worst_over_cap, default=None)
    if worst is not None and not worst.worst_over_cap <= float(CAP_SLACK):
        raise CertificateError(
            f"{worst.name} is {worst.worst_over_cap:.4g} times its cap now, so a bound from caps "
            "is not about this model. Call project_(model) first, or certify from the weights."
        )


def check_fingerprint(certificate: Certificate, found: str) -> None:
    """Raise CertificateError if the certificate's fingerprint is another than `found`."""
    if certificate.weights != found:
        what = "weights" if certificate.source == "weights" else "caps, biases or structure"
        raise CertificateError(
            f"the certificate belongs to other {what}: it carries "
            f"{certificate.weights[:23] or 'no fingerprint'}..., the model has {found[:23]}... . "
            "Restore what it was computed from, or certify again."
        )


def check_same(stated: Certificate, fresh: Certificate) -> None:
    """Raise CertificateError unless a stated certificate agrees with one computed anew.

    Both must be about the same model, under the same settings. No number that is stated may lie
    below the recomputed one by more than rounding explains.

    Args:
        stated: the certificate to check, read from a file say.
        fresh: the certificate that was computed now from the model.
    """
    check_settings(stated, fresh.settings)
    check_fingerprint(stated, fresh.weights)
    if _kept(stated) != _kept(fresh):
        raise CertificateError(
            f"it speaks of {_kept(stated)}, and the model's is of {_kept(fresh)}: it was edited, "
            "or made by other rules."
        )
    pairs = [
        ("lipschitz (log10)", stated.log10_lipschitz, fresh.log10_lipschitz),
        ("lipschitz", _log10(stated.lipschitz), _log10(fresh.lipschitz)),
        ("logit_difference", _log10(stated.logit_difference), _log10(fresh.logit_difference)),
        ("attention_logit", _log10(stated.attention_logit), _log10(fresh.attention_logit)),
    ]
    for a, b in zip(stated.layers, fresh.layers, strict=True):
        pairs.append((f"{a.name}, radius", _log10(a.radius), _log10(b.radius)))
        pairs.append((f"{a.name}, lipschitz", _log10(a.lipschitz), _log10(b.lipschitz)))
        pairs.append((f"{a.name}, total", a.log10_total, b.log10_total))
    wrong = next(((name, a, b) for name, a, b in pairs if _below(a, b)), None)
    if wrong is not None:
        raise CertificateError(
            f"it states 10^{wrong[1]:.4g} for {wrong[0]}, and only 10^{wrong[2]:.4g} can be "
            "proven: it was edited, or made by other rules."
        )
    if stated.radius < fresh.radius * (1 - 1e-9):
        raise CertificateError(
            f"it states radius {stated.radius:.4g}, and inputs reach {fresh.radius:.4g}, for "
            f"which {fresh.lipschitz:.6g} can be proven: it was edited, or made by other rules."
        )


def _kept(certificate: Certificate) -> tuple[Any, ...]:
    """The fields that rounding cannot change, so that they have to be equal."""
    c = certificate
    return c.norm, c.source, c.d_in, c.d_out, tuple(layer.name for layer in c.layers)


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


def _below(stated: float, fresh: float) -> bool:
    """Whether a stated log10 lies below the recomputed one by more than `_REPRODUCED` allows."""
    return fresh - stated > (_REPRODUCED * (1 + abs(stated)) if math.isfinite(stated) else 0.0)


@dataclass(frozen=True)
class Certificate(Stated):
    """A proven bound on how fast the logits of a model can move with its embeddings.

    Take any two inputs of the first block whose token norms are at most `radius`. The token norm of
    the difference of their logits is at most `lipschitz` times the token norm of the difference of
    the inputs. This holds for any mask and any length, with or without KV cache, in eval mode, and
    in real arithmetic on the stored weights.

    Attributes:
        lipschitz: the bound. It is inf where it exceeds 1.8e308; then see `log10_lipschitz`.
        log10_lipschitz: the base-10 logarithm of the bound, rounded up.
        radius: the bound holds on the ball of this radius, in token norm. Every input made of
            tokens lies in that ball.
        norm: the norms that the bound is between, in words.
        source: `"weights"` if it is about the weights as they are. `"caps"` if it holds for every
            step of a run that keeps the caps.
        layers: one LayerBound for each sub-block, and for each other step up to the logits.
        logit_difference: bound on how far the difference of any two logits of a token moves, per
            unit of token norm of the inputs' difference. It decides whether a prediction can
            change.
        d_in, d_out: widths of the embeddings and of the logits.
        attention_logit: all attention logits of a row lie within +- this number, up to a shift that
            is common to the row.
        assumptions: what the bound takes for granted, one sentence each.
        model: class and family of the model.
        weights: fingerprint of the model (see lip_plugin/certificate/fingerprint.py). `verify`
            compares it.
        settings: what the model's config said about its function, and what function_facts.py found.
    """

    def verify(self, model: nn.Module) -> None:
        """Raise CertificateError unless this certificate was computed from this very model.

        This does not tell whether the number is right. To find that out, certify again. If the
        model is sharded, all processes have to make this call together.
        """
        require_module(model, "verify")
        if has_shards(model):
            on_first_process(model, self.verify)
        else:
            check_belongs(self, model)

    def l2(self, tokens: int) -> float:
        """The bound between Euclidean norms over a whole sequence of `tokens` tokens: l2 -> l2.

        It says norm2(all logits' differences) <= l2 * norm2(all embeddings' differences). It
        follows from `lipschitz` by two facts about a sequence of vectors of width d. Its norm2 is
        at most sqrt(tokens d) times its token norm, which is used for the logits. Its token norm is
        at most norm2 / sqrt(d), which is used for the embeddings.

        Raises ConfigError if `tokens` is below 1.
        """
        if tokens < 1:
            raise ConfigError(f"Certificate.l2(tokens={tokens}): must be at least 1.")
        ratio = root(div(mul(up(tokens), up(self.d_out)), up(self.d_in)))
        return to_float(mul(up(self.lipschitz), ratio))

    def smallest_entropy_lower(self, visible: int) -> float:
        """Proven lower bound, in nats, on the entropy of attention over `visible` tokens."""
        return smallest_entropy_lower(self.attention_logit, visible)
